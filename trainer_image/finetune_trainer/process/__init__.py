"""One process and those around it: how it ends, what it may say, who watches over it. Knows nothing of jobs, models or data."""
