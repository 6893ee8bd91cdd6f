"""Models and tokenizers: found, loaded, asked. Knows neither how they are tuned nor what their answers are worth."""
