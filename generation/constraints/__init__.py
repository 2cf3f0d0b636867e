"""What a canvas may become: languages over characters, the automata over tokens they are compiled to, and exact inference with those.

The room knows tokenizers by the bytes of their ids, and nothing of models, canvases or steps.
"""
