"""The encoder `llm`: hidden states of a causal or vision-language model."""
