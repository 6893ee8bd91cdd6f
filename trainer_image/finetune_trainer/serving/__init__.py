"""A replica of a FineTuneEndpoint: what the pods beside an engine do, from fetching its base to telling what it answers as."""
