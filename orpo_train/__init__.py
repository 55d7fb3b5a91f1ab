"""Shards in, model out. Walk it as batching -> model -> logprobs -> objectives -> loop."""
