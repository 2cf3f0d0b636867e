"""How tokens come about: canvas after canvas, token after token, or both, one verifying the other. It knows no argument of a
caller, only the plan."""
