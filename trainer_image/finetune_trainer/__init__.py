"""What runs in a FineTuneJob's pods, and on a laptop by `finetune run --local`: prepare, train, evaluate, publish."""
