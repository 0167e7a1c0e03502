"""The rollout server: trees of sampled continuations with rewards, over HTTP."""
