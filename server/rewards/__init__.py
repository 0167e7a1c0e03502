"""Rewards: a response and its reference in, one number out, in worker processes with a hard time limit."""

from server.rewards.base import Grade, RewardFunction
from server.rewards.pool import RewardPool

__all__ = ["Grade", "RewardFunction", "RewardPool"]
