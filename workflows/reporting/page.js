"use strict";
// Draws the charts that the page has places for. The numbers are in the element #data; colours are the style sheet's.
const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;
const coarse = matchMedia("(pointer: coarse)").matches;
document.documentElement.classList.toggle("touch", coarse);
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map(); // a plot's element -> what draws it anew
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (number) => css(`--c${number % 6}`);

function element(parent, tag, text, className) {
  const made = parent.appendChild(document.createElement(tag));
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function layout(x, y) {
  const axis = {
    gridcolor: css("--grid"), linecolor: css("--faint"), zeroline: false, automargin: true, fixedrange: false,
    tickfont: { size: 11, color: css("--soft") }, title: { font: { size: 11, color: css("--soft") }, standoff: 6 },
  };
  return {
    margin: { l: 40, r: 10, t: coarse ? 30 : 6, b: 34 }, height: coarse ? 214 : 190, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: css("--ink") }, showlegend: false,
    hovermode: "x unified", dragmode: coarse ? false : "zoom",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--faint"), font: { size: 12, color: css("--ink") } },
    xaxis: { ...axis, ...x, title: { ...axis.title, text: x.label } },
    yaxis: { ...axis, ...y, title: { ...axis.title, text: y.label } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--ink") },
  };
}

const config = {
  responsive: true, displaylogo: false, displayModeBar: coarse, doubleClick: "reset",
  modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d"]],
};

function draw(figure, caption, traces, arrange) {
  const head = element(figure, "figcaption");
  caption(head);
  const plot = element(figure, "div", "", "plot");
  const show = () => Plotly.react(plot, traces(), arrange(), config);
  drawn.set(plot, { show, recolour: () => { head.replaceChildren(); caption(head); show(); } });
  show();
  return plot;
}

function legend(head, title, unit, entries) {
  element(head, "b", title);
  if (unit) element(head, "span", unit);
  for (const entry of entries) {
    const label = element(head, "span");
    const key = element(label, "i", "", entry.dots ? "dots" : "");
    if (entry.dots) key.style.background = entry.colour;
    else key.style.borderTop = `2px ${entry.line ?? "solid"} ${entry.colour}`;
    label.append(entry.name);
  }
}

// The mean of each point and its neighbours, half a window to either side; gaps stay. Summed as differences from the
// point, so that the mean of what never changes is exactly that, and the axis does not show rounding errors.
function running(values) {
  const half = Math.max(2, Math.round(values.length / 40));
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, i - half), i + half + 1).filter((other) => other !== null);
    return value + near.reduce((sum, other) => sum + (other - value), 0) / near.length;
  });
}

function curves(series, number, chart) {
  const trace = curve(series, number, chart);
  if (series.sparse || series.x.length < 60) return [trace];
  return [
    { ...trace, opacity: 0.3, line: { ...trace.line, width: 1 } },
    { ...trace, y: running(series.y), opacity: 1, line: { ...trace.line, width: 2 }, name: `${trace.name}, mean` },
  ];
}

// Of several runs each has a colour, and what a chart shows of each a kind of line: CSS's name for it, and plotly's.
const lines = [["solid", "solid"], ["dotted", "dot"], ["dashed", "dash"]];
const namesIn = (chart) => [...new Set(chart.series.map((series) => series.name))];

// What stands beside a chart's title: its curves; of several runs the runs, then the kinds of lines.
function entriesOf(chart) {
  const names = namesIn(chart);
  if (!several) return names.length > 1 ? chart.series.map((s, i) => ({ name: s.name, colour: colour(i), dots: s.sparse })) : [];
  const runs = data.runs.filter((run) => chart.series.some((s) => s.run === run));
  return [
    ...runs.map((run) => ({ name: run, colour: colour(data.runs.indexOf(run)), dots: true })),
    ...(names.length > 1 ? names.map((name, i) => ({ name, line: lines[i][0], colour: css("--soft") })) : []),
  ];
}

function curve(series, number, chart) {
  const paint = colour(several ? data.runs.indexOf(series.run) : number);
  const marks = series.sparse || series.x.length < 3;
  return {
    x: series.x, y: series.y, type: "scatter", mode: marks ? "lines+markers" : "lines",
    name: several ? `${series.run}, ${series.name}` : series.name,
    line: { color: paint, width: series.sparse ? 2 : 1.6, dash: several ? lines[namesIn(chart).indexOf(series.name)][1] : "solid" },
    marker: { color: paint, size: 6 }, opacity: series.sparse || chart.series.length === 1 ? 1 : 0.85,
    hovertemplate: `%{y:.4~g} ${chart.unit}`,
  };
}

const groups = data.groups.map(() => []); // the plots of each step, which zoom together
let following = false;

function together(plot, group) {
  groups[group].push(plot);
  plot.on("plotly_relayout", (change) => {
    if (following || !Object.keys(change).some((key) => key.startsWith("xaxis."))) return;
    const update = { "xaxis.range": [...plot.layout.xaxis.range], "yaxis.autorange": true };
    following = true;
    Promise.all(groups[group].filter((other) => other !== plot).map((other) => Plotly.relayout(other, update)))
      .finally(() => { following = false; });
  });
}

// All steps that a group of charts shows, with a little room.
function extent(group) {
  const steps = data.groups[group].charts.flatMap((chart) => chart.series.flatMap((s) => [s.x[0], s.x[s.x.length - 1]]));
  const [low, high] = [Math.min(...steps), Math.max(...steps)];
  const room = Math.max(0.3, (high - low) * 0.02);
  return [low - room, high + room];
}

function drawCurves(figure) {
  const [group, number] = figure.dataset.chart.split(",").map(Number);
  const chart = data.groups[group].charts[number];
  const caption = (head) => {
    legend(head, chart.title, chart.unit, entriesOf(chart));
    if (chart.gaps) element(head, "span", `gaps: ${chart.gaps} infinite or not a number`);
  };
  const plot = draw(figure, caption,
    () => chart.series.flatMap((series, i) => curves(series, i, chart)),
    () => layout({ label: "step", tickformat: ",d", range: extent(group), uirevision: true }, { nticks: 5, uirevision: true }));
  together(plot, group);
}

function drawScores(figure) {
  const chart = data.scores[Number(figure.dataset.score)];
  const stages = [...chart.stages].reverse();
  const runs = data.runs.filter((run) => chart.points.some((point) => point.run === run));
  const paint = (run) => colour(data.runs.indexOf(run));
  const height = Math.max(120, (coarse ? 78 : 54) + 30 * stages.length * (several ? 1.3 : 1));
  const caption = (head) => legend(head, `${chart.task}, ${chart.metric}`, chart.unit, several
    ? runs.map((run) => ({ name: run, colour: paint(run), dots: true })) : []);
  const traces = () => runs.map((run, i) => {
    const points = chart.points.filter((point) => point.run === run);
    const shift = ((runs.length - 1) / 2 - i) * (0.5 / runs.length);
    return {
      x: points.map((p) => p.value), y: points.map((p) => stages.indexOf(p.stage) + shift), type: "scatter", mode: "markers",
      marker: { color: paint(run), size: 9 }, name: run, text: points.map((p) => p.stage),
      error_x: {
        symmetric: false, array: points.map((p) => (p.interval ?? [0, p.value])[1] - p.value),
        arrayminus: points.map((p) => p.value - (p.interval ?? [p.value])[0]), color: paint(run), thickness: 1.6, width: 0,
      },
      customdata: points.map((p) => p.interval === null ? "" : ` (${p.interval.map((end) => end.toFixed(1)).join(" to ")})`),
      hovertemplate: `%{text}: %{x:.1f}%{customdata} ${chart.unit}<extra>${several ? "%{fullData.name}" : ""}</extra>`,
    };
  });
  draw(figure, caption, traces, () => ({
    ...layout({ nticks: 6 }, { tickvals: stages.map((_, i) => i), ticktext: stages, range: [-0.6, stages.length - 0.4], showgrid: true, ticklabelstandoff: 8, fixedrange: true }),
    hovermode: "closest", height,
  }));
  figure.querySelector(".plot").style.height = `${height}px`;
}

function drawIn(part) {
  for (const figure of part.querySelectorAll("figure")) {
    if (figure.childElementCount || figure.closest("details:not([open])")) continue;
    if (figure.dataset.chart) drawCurves(figure);
    else drawScores(figure);
  }
}

drawIn(document);
for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", () => drawIn(details));
dark.addEventListener("change", () => { for (const { recolour } of drawn.values()) recolour(); });
document.documentElement.dataset.ready = "true";
