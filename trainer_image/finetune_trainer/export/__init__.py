"""What is made of a result and where it goes: forms, bundle, model card, volumes and hubs. Knows no training."""
