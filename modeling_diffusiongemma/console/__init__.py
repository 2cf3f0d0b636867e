"""The console, a file a command, and what it shares with the server. Only it knows of command lines and terminals; `usage` and
`arguments` do without torch."""
