"""Small chat templates that behave as those of well-known models do, and a tokenizer for them."""

from typing import Any

from tests.support.tokenizers import byte_level_core
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from swlora.data.examples import Example, Message

Turns = tuple[tuple[str, str], ...]


def chat(turns: Turns, answer: str | None = None) -> Example:
    """Make the chat of (role, content) turns, and an answer of the assistant behind them."""
    added = () if answer is None else (("assistant", answer),)
    return Example.chat(Message(*turn) for turn in (*turns, *added))


_TURNS = "{% for m in messages %}"
_NO_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
CHATML = (
    f"{_TURNS}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    f"{{{{ bos_token }}}}{_TURNS}{_NO_SYSTEM}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    f"{_TURNS}<|{{{{ m.role }}}}|>\n{{{{ m.content }}}}<|end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_2 = (
    f"{_TURNS}{{% if m.role == 'user' %}}"
    "{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    f"{{{{ bos_token }}}}{_TURNS}<|start_header_id|>{{{{ m.role }}}}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
ZEPHYR = (
    f"{_TURNS}<|{{{{ m.role }}}}|>\n{{{{ m.content }}}}{{{{ eos_token }}}}\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_END = (
    f"{_TURNS}{{{{ m.role }}}}: {{{{ m.content }}}}\n\n{{% endfor %}}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# The system's words stand in the user's last turn, as long as nothing follows it
SYSTEM_IN_THE_LAST_TURN = (
    "{{ bos_token }}{% set first = messages[0] %}"
    f"{_TURNS}{{% if m.role == 'user' %}}[INST] "
    "{{ first.content + '\n\n' if first.role == 'system' and loop.last else '' }}"
    "{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Reasoning: the generation prompt opens a block, and the answer ...
_OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
_CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
THINK_PLAIN = f"{_TURNS}{_CHATML_TURN}{{% endfor %}}{_OPENS}"  # ... is written as it stands
THINK_ALWAYS = (  # ... is always put into a block, empty where it has none
    f"{_TURNS}{{% if m.role == 'assistant' %}}<|im_start|>assistant\n<think>\n"
    "{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}"
    "{% endif %}{{ '\n</think>\n\n' ~ m.content.split('</think>')[-1].strip() }}<|im_end|>\n"
    f"{{% else %}}{_CHATML_TURN}{{% endif %}}{{% endfor %}}{_OPENS}"
)
THINK_DROPPED = (  # ... loses its block
    f"{_TURNS}{{% if m.role == 'assistant' %}}<|im_start|>assistant\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    f"{{% else %}}{_CHATML_TURN}{{% endif %}}{{% endfor %}}{_OPENS}"
)
THINK_DOUBLED = (  # ... stands behind an opening of the template's own
    f"{_TURNS}<|im_start|>{{{{ m.role }}}}\n{{% if m.role == 'assistant' %}}<think>\n{{% endif %}}"
    f"{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}{_OPENS}"
)
THINK_NEVER = CHATML.replace("assistant\n{%", "assistant\n<think>\n\n</think>\n\n{%")

SPECIAL = {
    "<s>": 256,
    "</s>": 257,
    "<|im_start|>": 258,
    "<|im_end|>": 259,
    "<start_of_turn>": 260,
    "<end_of_turn>": 261,
    "<|user|>": 262,
    "<|assistant|>": 263,
    "<|end|>": 264,
    "<|start_header_id|>": 265,
    "<|end_header_id|>": 266,
    "<|eot_id|>": 267,
}


def chat_tokenizer(template: str, *, special: bool = True, **tokens: Any) -> Any:
    """Make a tokenizer: a byte is its value, the tokens of SPECIAL follow; BOS before every text.

    With `special` false, those but <s> and </s> are tokens that count as text.
    """
    core = byte_level_core()
    for i, text in enumerate(SPECIAL):
        add = core.add_special_tokens if special or i < 2 else core.add_tokens
        add([AddedToken(text, special=special or i < 2)])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL["<s>"])]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>"} | tokens
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)
