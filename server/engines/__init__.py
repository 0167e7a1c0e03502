"""Engines: token ids in, token ids and behaviour logprobs out, behind one Protocol (`base.Engine`)."""
