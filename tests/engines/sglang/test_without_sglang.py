"""What the SGLang package computes without SGLang."""

from __future__ import annotations

import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from crosstrim import TrimConfig, mini
from crosstrim.engines.prompt import Prompt, PromptTrim, attend, cross_attend
from crosstrim.engines.sglang import launch, slots
from crosstrim.engines.sglang.settings import Settings
from crosstrim.errors import ConfigError, CrosstrimWarning, EngineError, InputError
from crosstrim.method.geometry import Geometry

IMAGE = 9
GEOMETRY = Geometry(features_per_tile=5, tiles_per_image=4, query_heads=4, key_value_heads=2, head_size=8)


def trimming(**options) -> PromptTrim:
    return PromptTrim(Settings.read(options, {}).config, GEOMETRY, IMAGE, None)


class TestSettings:
    def test_nothing_given_is_lossless(self):
        assert Settings.read({}, {}) == Settings(TrimConfig(), free_slots=True)

    def test_from_the_environment(self):
        environment = {"CROSSTRIM_K": "0.25", "CROSSTRIM_POLICY": "mass:0.9", "CROSSTRIM_FREE_SLOTS": "false"}
        assert Settings.read({}, environment) == Settings(TrimConfig(k=0.25, policy="mass:0.9"), free_slots=False)

    @pytest.mark.parametrize(("text", "keep"), [("0.5", 0.5), ("2048", 2048), ("1", 1), ("1.0", 1.0)])
    def test_a_share_is_no_count(self, text, keep):
        read = Settings.read({}, {"CROSSTRIM_KEEP": text}).config.keep
        assert (read, type(read)) == (keep, type(keep))

    def test_both_places(self):
        with pytest.raises(ConfigError, match=r"k is given twice, by CROSSTRIM_K=0\.5 and .* as 0\.25; remove one"):
            Settings.read({"k": 0.25}, {"CROSSTRIM_K": "0.5"})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"trim_first_layer": False}, r"trim_first_layer=False .* cannot be had in SGLang"),
            ({"policy": "pyramid", "k": 0.5}, "policy='pyramid' keeps less from layer to layer"),
            ({"keep": 0.5, "merge": True}, "merge=True cannot be had in SGLang.*leave it out"),
            ({"k": "much"}, "k='much' must be a share"),
            ({"kay": 0.5}, "unknown option 'kay'"),
            ({"free_slots": "perhaps"}, "free_slots='perhaps' must be true or false"),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            Settings.read(options, {})

    @pytest.mark.parametrize(
        ("options", "depends"),
        [({}, False), ({"keep": 0.5}, False), ({"keep": 3, "policy": "mass"}, False), ({"k": 0.5}, True)],
    )
    def test_when_the_count_is_known_beforehand(self, options, depends):
        assert trimming(**options).config.count_depends_on_prompt is depends
        assert trimming(policy="mass:0.5").config.count_depends_on_prompt


class TestVisible:
    def test_rows_from_the_image_on_see_its_real_tiles(self):
        visible = trimming().visible([1, 2, IMAGE, 3, 4], [3])
        assert visible.shape == (5, 4)
        assert not visible[:2].any()
        assert visible[2:, :3].all()
        assert not visible[:, 3:].any()

    def test_rows_see_the_latest_image(self):
        visible = trimming().visible([1, IMAGE, 2, IMAGE, 3], [1, 4])
        assert visible[1:3, :1].all()
        assert not visible[1:3, 4:].any()
        assert visible[3:, 4:].all()
        assert not visible[3:, :4].any()


class TestSlots:
    @pytest.mark.parametrize(
        ("options", "tiles", "slots"),
        [
            ({}, [1], 5),
            ({}, [4], 20),
            ({"keep": 0.5}, [3], 8),
            ({"keep": 4}, [3], 4),
            ({"keep": 400}, [2], 10),
            ({"k": 0.1}, [4], 8),  # four heads may name two different features each
            ({"k": 0.5}, [4], 20),
            ({"policy": "mass:0.5"}, [2], 10),
        ],
    )
    def test_of_one_image(self, options, tiles, slots):
        assert trimming(**options).slots([1, IMAGE, 2], tiles) == slots

    def test_an_image_nobody_will_look_at_again_needs_none(self):
        assert trimming().slots([IMAGE, 1, IMAGE, 2], [4, 1]) == 5
        assert trimming().slots([IMAGE, IMAGE, 2], [4, 1]) == 25


def choose(options, ids, tiles, *heads, all_heads=lambda tensor: tensor):
    trim = trimming(**options)
    return trim.choose(ids, trim.visible(ids, tiles), *heads, all_heads).nonzero().squeeze(-1)


def lead(prompt, queries, keys, values):
    """The first cross-attention layer's work for a prompt alone; its attention."""
    (_, _, output), *_ = cross_attend([prompt], queries, lambda features: (keys, values), lambda heads: heads)
    return output


class TestChoose:
    ids = (1, IMAGE, 2, 3, 4, 5)

    def heads(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        queries = torch.randn(len(self.ids), 4, 8, generator=generator)
        return queries, *torch.randn(2, 20, 2, 8, generator=generator)

    @pytest.mark.parametrize("options", [{}, {"k": 0.2}, {"keep": 0.3}, {"keep": 4, "policy": "mmr"}])
    def test_never_more_than_the_slots(self, options):
        kept = choose(options, self.ids, [3], *self.heads())
        slots = trimming(**options).slots(self.ids, [3])
        assert len(kept) <= slots
        if "k" not in options:
            assert len(kept) == slots
        assert kept.max() < 15

    def test_ranks_that_see_half_of_the_heads_choose_what_one_rank_would(self):
        options = {"keep": 0.3}
        queries, keys, values = self.heads()
        whole = choose(options, self.ids, [4], queries, keys, values)
        joined = iter([self.saliency_of(queries, keys), keys.transpose(0, 1)[None], values.transpose(0, 1)[None]])
        parts = queries[:, :2], keys[:, :1], values[:, :1]
        half = choose(options, self.ids, [4], *parts, all_heads=lambda heads: next(joined))
        assert half.tolist() == whole.tolist()

    def saliency_of(self, queries, keys):
        import crosstrim

        visible = trimming().visible(self.ids, [4])[None]
        return crosstrim.saliency(queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], visible)


class TestPrompt:
    """As the layers meet it: seven rows, of which the last two were generated before the request lost its memory."""

    ids = (1, IMAGE, 2, 3, 4)

    def prompt(self, options, tiles=(3,), ids=ids, generated=2):
        features = torch.zeros(20 * len(tiles), 6)
        return Prompt(trimming(**options), ids, tiles, slice(0, len(ids) + generated), features)

    def heads(self, rows, features):
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(rows, 4, 8, generator=generator)
        return queries, *torch.randn(2, features, 2, 8, generator=generator)

    @pytest.mark.parametrize("options", [{}, {"keep": 0.3}, {"k": 0.1}], ids=str)
    def test_what_was_generated_reads_what_was_kept(self, options):
        prompt, whole = self.prompt(options), self.prompt(options, generated=0)
        queries, keys, values = self.heads(7, 20)
        output, alone = lead(prompt, queries, keys, values), lead(whole, queries[:5], keys, values)
        assert prompt.kept.tolist() == whole.kept.tolist()
        torch.testing.assert_close(output[:5], alone)
        kept = prompt.kept
        torch.testing.assert_close(output[5:], attend(queries[5:], keys[kept], values[kept]))
        assert prompt.sees.tolist() == [False, *[True] * 6]

    def test_rows_see_the_real_tiles(self):
        prompt = self.prompt({"keep": 4})
        queries, keys, values = self.heads(7, 20)
        output = lead(prompt, queries, keys, values)
        assert not output[0].any()
        torch.testing.assert_close(output[1:5], attend(queries[1:5], keys[:15], values[:15]))
        later = prompt.follow(queries, keys[prompt.kept], values[prompt.kept])
        assert not later[0].any()
        torch.testing.assert_close(later[1:], attend(queries[1:], keys[prompt.kept], values[prompt.kept]))

    def test_two_images_of_which_the_first_token_sees_one(self):
        ids = (IMAGE, IMAGE, 2)
        prompt = self.prompt({}, (4, 1), ids, generated=1)
        queries, keys, values = self.heads(4, 40)
        output = lead(prompt, queries, keys, values)
        assert prompt.kept.tolist() == [*range(20), *range(20, 25)]
        torch.testing.assert_close(output[:1], attend(queries[:1], keys[:20], values[:20]))
        torch.testing.assert_close(output[1:], attend(queries[1:], keys[:25], values[:25]))
        later = prompt.follow(queries, keys[:25], values[:25])
        torch.testing.assert_close(later[:1], attend(queries[:1], keys[:20], values[:20]))


class TestImagesThatStandTogether:
    def test_taken(self):
        trimming().check_images([1, IMAGE, IMAGE, 2], 2)
        trimming().check_images([1, 2], 0)

    @pytest.mark.parametrize(
        ("ids", "images", "message"),
        [
            ([1, 2], 1, "0 image tokens"),
            ([IMAGE, IMAGE], 1, "2 image tokens .* for 1 pictures"),
            ([IMAGE, 1, IMAGE], 2, "text between two pictures"),
        ],
    )
    def test_refused(self, ids, images, message):
        with pytest.raises(InputError, match=message):
            trimming().check_images(ids, images)


class TestAttend:
    def test_against_plain_arithmetic(self):
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(3, 4, 8, generator=generator)
        keys, values = torch.randn(2, 7, 2, 8, generator=generator)
        visible = torch.rand(3, 7, generator=generator) < 0.5
        visible[1] = False
        output = attend(queries, keys, values, visible)
        assert not output[1].any()
        for row in (0, 2):
            for head in range(4):
                scores = keys[:, head // 2] @ queries[row, head] / 8**0.5
                weights = scores.masked_fill(~visible[row], -torch.inf).softmax(-1)
                torch.testing.assert_close(output[row, head], weights @ values[:, head // 2])


class TestSlotsGivenBack:
    def test_the_row_closes_up(self):
        table = torch.arange(24).view(2, 12)
        kv = SimpleNamespace(req_pool_idx=1, kv_allocated_len=9, kv_committed_len=9)
        freed = slots.close_up(table, kv, kept=2, held=5)
        assert freed.tolist() == [14, 15, 16]
        assert table[1, :6].tolist() == [12, 13, 17, 18, 19, 20]
        assert table[0].tolist() == list(range(12))
        assert (kv.kv_allocated_len, kv.kv_committed_len) == (6, 6)

    def test_also_where_more_goes_than_follows(self):
        table = torch.arange(12).view(1, 12)
        kv = SimpleNamespace(req_pool_idx=0, kv_allocated_len=10, kv_committed_len=10)
        assert slots.close_up(table, kv, kept=1, held=8).tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert table[0, :3].tolist() == [0, 8, 9]

    def test_the_plugin_keeps_still_in_another_model(self, monkeypatch):
        monkeypatch.delenv("SGLANG_EXTERNAL_MODEL_PACKAGE", raising=False)
        slots.register()  # would import SGLang


class TestLaunch:
    def test_the_command(self):
        arguments, environment = launch.command(
            "mini",
            TrimConfig(keep=0.5, policy="union"),
            device="cpu",
            port=1234,
            tensor_parallel=2,
            options=["--log-level", "info"],
        )
        assert arguments[:3] == [sys.executable, "-m", "sglang.launch_server"]
        assert arguments[-2:] == ["--log-level", "info"]
        given = dict(itertools.pairwise(arguments))
        assert given["--model-path"] == str(mini.path())
        assert json.loads(given["--json-model-override-args"]) == {
            "crosstrim": {"version": 1, "keep": 0.5, "policy": "union"}
        }
        assert (given["--port"], given["--tp-size"], given["--device"]) == ("1234", "2", "cpu")
        assert environment.pop("SGLANG_EXTERNAL_MODEL_PACKAGE") == "crosstrim.engines.sglang"
        assert environment == {"SGLANG_USE_CPU_ENGINE": "1"}

    def test_refused_before_anything_starts(self):
        with pytest.raises(ConfigError, match="pyramid"):
            launch.command("mini", TrimConfig(k=0.5, policy="pyramid"))

    @pytest.mark.parametrize(
        ("name", "value", "remedy"),
        [
            ("disable_radix_cache", False, "--disable-radix-cache"),
            ("page_size", 16, "--page-size 1"),
            ("attention_backend", "fa3", "--attention-backend torch_native"),
            ("disable_overlap_schedule", False, "--disable-overlap-schedule"),
            ("chunked_prefill_size", 4096, "--chunked-prefill-size -1"),
        ],
    )
    def test_a_server_set_up_otherwise_is_refused(self, name, value, remedy):
        tested = SimpleNamespace(**{name: required for name, (required, _) in launch._REQUIRED.items()})
        settings = Settings(TrimConfig(keep=0.5))
        launch.check_server(tested, settings)
        setattr(tested, name, value)
        with pytest.raises(EngineError, match=f"{name}={value!r}; start it with {remedy}"):
            launch.check_server(tested, settings)

    @pytest.mark.parametrize("backend", ["fa3", "flashinfer"])
    def test_backends_that_plan_ahead(self, backend):
        server = SimpleNamespace(**{name: required for name, (required, _) in launch._REQUIRED.items()})
        server.attention_backend = backend
        for options in ({"keep": 0.5}, {}):
            allowed = Settings.read({**options, "allow_untested_backend": True}, {})
            with pytest.warns(CrosstrimWarning, match=f"tested with .* torch_native alone, not with {backend}"):
                launch.check_server(server, allowed)
            with pytest.raises(EngineError, match=f"or try {backend} with --allow-untested-backend"):
                launch.check_server(server, Settings.read(options, {}))
        for options in ({"k": 0.5}, {"policy": "mass:0.9"}):
            with pytest.raises(EngineError, match="give keep= in place of k"):
                launch.check_server(server, Settings.read({**options, "allow_untested_backend": True}, {}))

    def test_the_command_allows_them(self):
        options = ["--attention-backend", "fa3"]
        arguments, environment = launch.command(
            "mini", TrimConfig(keep=0.5), allow_untested_backend=True, options=options
        )
        assert arguments[-2:] == options
        assert environment["CROSSTRIM_ALLOW_UNTESTED_BACKEND"] == "true"


def test_another_model_than_ours_is_refused():
    runner = SimpleNamespace(model_runner=SimpleNamespace(model=torch.nn.Linear(1, 1)))
    with pytest.raises(
        EngineError, match=r"SGLang runs torch\.nn\.modules\.linear\.Linear, although .* 'Ignore import"
    ):
        slots.after_loading(None, SimpleNamespace(tp_worker=runner))
