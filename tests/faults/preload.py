"""What every process of the fault suite imports, once and before it is forked; nothing here starts a thread."""
# ruff: noqa: F401 - importing is the purpose

import fastapi
import redis.asyncio
import torch
import torch.utils.tensorboard
import transformers
import transformers.models.qwen2.modeling_qwen2
import uvicorn

import server.__main__
import server.life
import server.run
import trainer.lease
import trainer.policy
import trainer.publish
import trainer.train
