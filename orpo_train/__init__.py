"""Shards in, model out. Walk it as batching -> layout -> attention -> model -> logprobs -> objectives -> loop."""
