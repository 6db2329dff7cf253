"""The command line: options in, a stage called, a table printed; no logic."""
