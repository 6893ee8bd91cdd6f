"""Checkpoints and the result on the volume: written whole or not counted, found again, resharded. Knows neither methods nor objectives."""
