"""OpenAI's fine-tuning API over FineTuneJobs. Imported only where an administrator turned it on."""
