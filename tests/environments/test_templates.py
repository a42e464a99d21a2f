"""Text between turns: real chat templates that can be continued and those that cannot; the page's own examples."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import trl

from accord.environments import End, Observation, Turn, environments_of
from accord.environments.calls import CallFormat, call_format
from accord.errors import ChatTemplateError, RowError
from accord.models.load import load_policy
from accord.models.network import Policy
from accord.models.render import Renderer
from accord.models.tiny import save_tiny, tiny_tokenizer
from accord.sampling.request import Request, SamplingConfig
from accord.train.conversations import Conversations
from accord.types import Completion, Message, Prompt

STOP = 2
REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return load_policy(str(save_tiny(tmp_path_factory.mktemp("llama"))))


@pytest.mark.parametrize(("template", "ok"), [("qwen2_5", True), ("qwen3_training", True), ("qwen3", False)])
def test_real_templates_and_answers_of_the_user(template: str, ok: bool, policy: Policy) -> None:
    """Qwen 3 takes the thoughts out of earlier turns; after answers of a tool it keeps them."""
    renderer = Renderer(policy)
    renderer.tokenizer = tiny_tokenizer(chat_template=(TEMPLATES / f"{template}.jinja").read_text())
    prompt = (Message("user", "Hi."),)
    tools = environments_of({"name": "tools", "tools": ["calculator"]}, renderer.tokenizer).tools
    renderer.check_turns(prompt, "tool", tools)
    if ok:
        renderer.check_turns(prompt, "user")
    else:
        with pytest.raises(ChatTemplateError, match=r"A thought.*becomes"):
            renderer.check_turns(prompt, "user")


def test_a_plain_prompt_begins_no_conversation(policy: Policy) -> None:
    with pytest.raises(RowError, match="plain-text prompt"):
        Renderer(policy).check_turns("Say:", "user")


def test_the_examples_of_the_page_work(policy: Policy, tmp_path: Path) -> None:
    """The environment, on numbers; the chat template, with calls that are read back as they were written."""
    page = (REPOSITORY / "docs" / "online.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "game.py").write_text(code)
    environments = environments_of({"name": f"{tmp_path / 'game.py'}:Guess"}, policy.tokenizer)
    game = environments.make(Prompt("p", (Message("user", "Guess."),), fields={"number": 7}), 0)
    said = [game.reply(Turn(text, "stop", k + 1, last=False)) for k, text in enumerate(["Is it 9", "many", "then 7"])]
    assert [answer.messages[0].content for answer in said[:2] if isinstance(answer, Observation)] == [
        "Lower.",
        "That is no number.",
    ]
    assert said[2] == End(1.0, {"guesses": 3})
    assert game.reply(Turn("8", "stop", 8, last=True)) == End(0.0, {"guesses": 8})
    renderer = Renderer(policy)
    renderer.tokenizer = tiny_tokenizer(chat_template=(REPOSITORY / "docs" / "tools.jinja").read_text())
    tools = environments_of({"name": "tools", "tools": ["calculator", "python"]}, renderer.tokenizer).tools
    for system in ((), (Message("system", "Be brief."),)):
        prompt = (*system, Message("user", "Hi."))
        renderer.check_turns(prompt, "tool", tools)
        renderer.check_turns(prompt, "user")
    assert call_format(renderer.tokenizer) == CallFormat("<tool_call>", "name", "arguments")


def test_tools_are_shown_called_and_answered_in_the_models_own_format(tmp_path: Path) -> None:
    """A model that always calls: of its first turn the calculator's answer is in the row, as the template writes it."""
    policy = load_policy(
        str(save_tiny(tmp_path, max_position_embeddings=2048)), chat_template=(TEMPLATES / "qwen2_5.jinja").read_text()
    )
    renderer = Renderer(policy)
    environments = environments_of({"name": "tools", "tools": ["calculator"], "max_turns": 3}, policy.tokenizer)
    prompt = Prompt("p", (Message("user", "Compute."),))
    ids = renderer.prompt(prompt.content, None, environments.tools)
    assert '"name": "calculator"' in policy.tokenizer.decode(ids)
    sampling = SamplingConfig(max_new_tokens=400)
    table = Conversations(environments, renderer, sampling, rewarded=False).table(
        [prompt], [Request("p", tuple(ids), 0)]
    )
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>'
    said = (*policy.tokenizer.encode(call, add_special_tokens=False), STOP)
    zeros = (0.0,) * len(said)
    turn = Completion("p", call, said, zeros, zeros, "stop", 1.0, 0)
    request = table.follow(0, turn).result()
    assert request is not None
    assert request.prompt_ids[: len(ids) + len(said)] == (*ids.tolist(), *said)
    between = policy.tokenizer.decode(request.prompt_ids[len(ids) + len(said) :])
    assert between == "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    done = (*policy.tokenizer.encode("It is 42.", add_special_tokens=False), STOP)
    assert table.follow(0, replace(turn, token_ids=done, logprobs=done, raw_logprobs=done)).result() is None
    completion = table.completion(0)
    assert completion.episode is not None
    assert completion.episode.reward is None
    assert completion.episode.parts == {"tool_calls": 1, "tool_errors": 0}
    assert [message.role for message in completion.episode.messages] == ["assistant", "tool", "assistant"]
