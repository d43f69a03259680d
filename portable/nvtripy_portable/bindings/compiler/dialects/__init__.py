"""The dialects that nvtripy emits."""
