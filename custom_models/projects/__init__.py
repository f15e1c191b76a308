"""The course's projects: each trains one of the models of this folder on real data, and says how good it is."""
