"""The gateway: one OpenAI-compatible address in front of all FineTuneEndpoints (docs/gateway.md)."""
