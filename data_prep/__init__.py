"""Data for training and scoring: one module per data set, and the module that feeds it to LitGPT.

`ChatData` is imported when asked for, so that preparing data does not load torch and LitGPT.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.chat_data import ChatData

__all__ = ["ChatData"]


def __getattr__(name: str) -> Any:
    if name != "ChatData":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from data_prep.chat_data import ChatData

    return ChatData
