"""Text at the rim: prompts into token ids, and token ids into text for rewards and people.

What was sampled is decoded, and never tokenised again.
"""

from collections.abc import Sequence
from typing import Any

from shared.errors import ConfigError, RequestError
from shared.wire import Message


class Tokens:
    """The model's tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401  # transformers has no one public type for it
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, model: str) -> "Tokens":
        """Load the tokenizer of a checkpoint.

        Raises:
            ConfigError: the checkpoint has none, or cannot be found.
        """
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(model))
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"--model {model}: no tokenizer could be loaded: {first}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer adds by itself."""
        return [int(token) for token in self._tokenizer(text)["input_ids"]]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, ending where the assistant's answer begins.

        Raises:
            RequestError: the tokenizer has no chat template, or it refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise RequestError(
                "messages", "this model has no chat template; send prompt or prompt_token_ids"
            )
        plain = [message.model_dump() for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=True
            )
        except (
            Exception
        ) as error:  # a template is a program of the model's author: it may raise anything
            raise RequestError(
                "messages", f"the model's chat template refuses them: {error}"
            ) from None
        encoded = self._tokenizer(text, add_special_tokens=False)
        return [int(token) for token in encoded["input_ids"]]

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """Text of some tokens; special tokens such as the end token are left out unless `special`."""
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return str(text)
