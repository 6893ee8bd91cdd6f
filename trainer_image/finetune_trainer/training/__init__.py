"""What learns and how: methods, objectives, the plan, the processes of a run. Knows no stage."""
