"""What is measured of a model, and whether it is enough. Knows neither methods nor objectives."""
