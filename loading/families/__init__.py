"""The families of models, a file each: their configuration, and the table from their stored names to parameters."""
