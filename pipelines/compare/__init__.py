"""The paper's comparison: several ways of training on one dataset, judged by one reward model."""
