"""Who is told of a canvas while it is denoised: watchers, events, text as it grows, a terminal. None knows the loop that tells it."""
