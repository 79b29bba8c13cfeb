"""Chat models for other programs: the tokens that end what a model writes, and a template that lays a chat out.

The template is Jinja, as `apply_chat_template` of transformers reads it, and gives exactly the ids of training
(`bwlm/text/conversation.py`). It produces a text, and a text cannot say which of two equal strings is a marker and
which was typed. So in an export with a template the names of special tokens begin with a character that no text
holds: `<|user_end|>` that a person types stays text, and a message with that character is refused.
"""

from __future__ import annotations

from bwlm.config import Experiment
from bwlm.directions import is_marked, is_native, own_readings
from bwlm.phases import PHASES
from bwlm.text.conversation import TurnIds, predicts_user_turn
from bwlm.text.tokenizer import Tokenizer

MARK = "\ufdd0"
"""Prefix of the name of each special token: a noncharacter, which Unicode reserves for use inside programs."""

_TEMPLATE = """\
{#- Names of special tokens begin with the noncharacter U+FDD0, which no message may hold. -#}
{%- set mark = 'MARK' -%}
{{- mark + '<|bos|>' -}}
DIRECTION{%- set chat = namespace(last='assistant', system='') -%}
{%- for message in messages -%}
    {%- set role = message['role'] -%}
    {%- set content = message['content'] -%}
    {%- if content is not string -%}
        {{- raise_exception('messages[' ~ loop.index0 ~ '].content: must be a text') -}}
    {%- endif -%}
    {%- if mark in content -%}
        {{- raise_exception('messages[' ~ loop.index0 ~ '].content: holds U+FDD0, which begins special tokens') -}}
    {%- endif -%}
    {%- if role == 'system' and loop.first and not loop.last -%}
        {%- set chat.system = content + '\\n\\n' -%}
    {%- elif role not in ['user', 'assistant'] or role == chat.last -%}
        {{- raise_exception('messages[' ~ loop.index0 ~ '].role: user and assistant take turns, after at most one '
            ~ 'system message, and the user begins') -}}
    {%- else -%}
        {{- mark + '<|' + role + '_start|>' + chat.system + content + mark + '<|' + role + '_end|>' -}}
        {%- set chat.last = role -%}
        {%- set chat.system = '' -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if chat.last != 'user' -%}
        {{- raise_exception('messages: must end with the user, whom the model answers') -}}
    {%- endif -%}
    {{- mark + '<|assistant_start|>' -}}
{%- endif -%}
"""


def chats(experiment: Experiment) -> bool:
    """Return true for a model that was trained on conversations."""
    return not PHASES[experiment.phase].reads_documents


def chat_template(experiment: Experiment) -> str | None:
    """Return the Jinja template of a chat model that reads forward, else None.

    None for a model of documents, and for a model that reads backward alone: a template makes a text, not its tokens
    in reverse order. A bidirectional model gets the template of its forward reading.
    """
    if not chats(experiment) or not is_native(experiment.direction, "forward"):
        return None
    direction = "{{- mark + '<|forward|>' -}}\n" if is_marked(experiment.direction) else ""
    return _TEMPLATE.replace("MARK", MARK).replace("DIRECTION", direction)


def ends(experiment: Experiment, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end what a model writes: the closing marker of each of its readings, and BOS."""
    if not chats(experiment):
        return [tokenizer.bos]
    turns, reversal = TurnIds.from_tokenizer(tokenizer), experiment.data.reversal
    asking = [predicts_user_turn(reading, reversal) for reading in own_readings(experiment.direction)]
    markers = [turns.user_start if asks else turns.assistant_end for asks in asking]
    return [*dict.fromkeys(markers), tokenizer.bos]
