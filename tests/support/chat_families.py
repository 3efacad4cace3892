"""Small chat templates, each of which does what makes a family of models special."""

from typing import Any

from tests.support import chat_templates as shapes
from tests.support.chat_templates import SPECIAL

_ALTERNATE = (
    "{% set said = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% for m in said %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}{% endfor %}"
)
_WORDS_OF_SYSTEM = "{% set told = messages[0].content if messages[0].role == 'system' else '' %}"
_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_CALLS = (
    "{% for call in m.tool_calls or [] %}<call>"
    "{{ {'name': call.function.name, 'with': call.function.arguments} | tojson }}</call>"
    "{% endfor %}"
)

# System words of its own, tools behind them, answers of tools as parts of one user's turn
QWEN_2_5 = (
    f"{_WORDS_OF_SYSTEM}<|im_start|>system\n{{{{ told or 'You help.' }}}}"
    "{% if tools %}\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<answer>{{ m.content }}</answer>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content or '' }}"
    f"{_CALLS}<|im_end|>\n{{% elif m.role != 'system' %}}{_TURN}{{% endif %}}{{% endfor %}}{_ASK}"
)
# Reasoning is written behind the last question only, there always
QWEN_3 = (
    "{% set last = namespace(at=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.at = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content or '' %}"
    "{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set said = said.split('</think>')[-1].lstrip() %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > last.at %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    f"{{{{ said }}}}{_CALLS}<|im_end|>\n{{% else %}}{_TURN}{{% endif %}}{{% endfor %}}{_ASK}"
)
GEMMA_2 = _ALTERNATE + shapes.GEMMA
# The system's words stand in the user's first turn; contents may come in parts
GEMMA_3 = (
    f"{_ALTERNATE}{{{{ bos_token }}}}{{% for m in messages if m.role != 'system' %}}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ messages[0].content ~ '\n\n' if loop.first and messages[0].role == 'system' }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA_2 = _ALTERNATE + shapes.LLAMA_2.replace(
    "{{ m.content | trim }} [/INST]",
    "{{ '<<SYS>>' ~ messages[0].content ~ '<</SYS>>' if loop.index0 == 1 and messages[0].role == "
    "'system' }}{{ m.content | trim }} [/INST]",
)
# Today's date in the system's turn, tools in the first of the user
LLAMA_3 = (
    f"{_WORDS_OF_SYSTEM}{{{{ bos_token }}}}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today: {{ strftime_now('%d %b %Y') }}\n\n{{ told | trim }}<|eot_id|>"
    "{% for m in messages if m.role != 'system' %}<|start_header_id|>"
    "{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{% if loop.first and tools %}Functions: {{ tools | tojson }}\n\n{% endif %}"
    f"{{{{ (m.content or '') | trim }}}}{_CALLS}<|eot_id|>{{% endfor %}}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = _ALTERNATE + shapes.SYSTEM_IN_THE_LAST_TURN
SMOLLM_2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are small.<|im_end|>\n{% endif %}"
    + shapes.CHATML
)
# Marks of its own, a date, and no reasoning but in the last answer
SMOLLM_3 = (
    f"{_WORDS_OF_SYSTEM}<|im_start|>system\n{{{{ strftime_now('%d %B %Y') }}}}\n{{{{ told }}}}"
    "<|im_end|>\n{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{% if loop.last %}{{ m.content }}{% else %}"
    "{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>{% endgeneration %}{{ '\n' }}"
    f"{{% elif m.role != 'system' %}}{_TURN}{{% endif %}}{{% endfor %}}{_ASK}"
)
FAMILIES = {
    "Llama 2": LLAMA_2,
    "Llama 3": LLAMA_3,
    "Qwen 2.5": QWEN_2_5,
    "Qwen 3": QWEN_3,
    "Gemma 2": GEMMA_2,
    "Gemma 3": GEMMA_3,
    "Phi-3": shapes.PHI_3,
    "Mistral": MISTRAL,
    "SmolLM2": SMOLLM_2,
    "SmolLM3": SMOLLM_3,
    "ChatML": shapes.CHATML,
    "Zephyr": shapes.ZEPHYR,
}


def turn_by_turn(
    family: str, tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None
) -> list[tuple[list[int], list[int]]]:
    """Return the tokens before and of each answer, by rendering it where it would be generated."""
    found = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            options = {"tools": tools, "return_dict": False}
            before = tokenizer.apply_chat_template(
                messages[:i], add_generation_prompt=True, **options
            )
            whole = tokenizer.apply_chat_template(messages[: i + 1], **options)
            found.append((before, whole[len(before) :]))
            assert whole[: len(before)] == before
    if family == "SmolLM3":  # whose own marks leave out the line break behind a turn
        assert {answer.pop() for _, answer in found} == {ord("\n")}
    if family == "Phi-3":  # which writes EOS behind the last turn of a chat only
        assert {answer.pop() for _, answer in found[:-1]} <= {SPECIAL["</s>"]}
    return found


def taught(sequences: Any) -> list[tuple[list[int], list[int]]]:
    """Return (what comes before it, what is trained) of every trained run, shortest first."""
    found = []
    for ids, runs in sequences:
        at = 0
        for n, weight in runs:
            if weight:
                found.append((ids[:at], ids[at : at + n]))
            at += n
        assert at == len(ids)
    return sorted(found, key=lambda pair: len(pair[0]))
