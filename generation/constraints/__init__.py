"""What a canvas may become: a language over characters, the automaton over tokens it is compiled to, and exact inference with it."""
