"""Passes over a graph, one a file. Each has ``run(graph)``, which changes the graph in place and never its meaning."""
