"""The model, from layers to the head that generates. It knows neither a command line nor a server."""
