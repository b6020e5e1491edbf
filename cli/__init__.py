"""The command line: options in, one JSON object or a rendered report out."""
