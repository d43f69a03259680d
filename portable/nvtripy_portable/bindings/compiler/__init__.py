"""The compiler half: building a graph, and compiling it."""
