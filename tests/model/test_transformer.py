"""The decoder: masking, padding, initialisation, one graph for each shape."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from windtunnel.model.attention import attention_backend
from windtunnel.model.parametrization import NORMS, Parametrization
from windtunnel.model.shape import Shape
from windtunnel.model.transformer import KeyValueCache, Transformer

SHAPE = Shape(width=48, layers=2, heads=4, kv_heads=2, head_dim=16, ff=96, vocab=100, base_width=32, max_positions=64)


def _model(shape: Shape = SHAPE, dtype: torch.dtype = torch.float64, **options) -> Transformer:
    model = Transformer(shape, Parametrization(**options)).to(dtype)
    model.init_weights(0)
    return model


def _rows(documents: list[list[int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and document numbers from the lengths of each row's documents."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in documents], dtype=torch.int32)
    return torch.randint(0, SHAPE.vocab, numbers.shape, generator=generator), numbers


def _gradients(model: Transformer, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_row_of_documents_equals_each_document_alone() -> None:
    model = _model()
    rows = [[7, 1, 20, 4], [32], [1, 1, 30]]
    tokens, documents = _rows(rows)
    alone = []
    for row, lengths in zip(tokens, rows, strict=True):
        alone.append(torch.cat([model(part[None])[0] for part in row.split(lengths)]))
    reference = torch.stack(alone)[..., : SHAPE.vocab]
    weights = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = _gradients(model, (reference * weights).sum())
    for backend in ("dense", "documents"):
        model.backend = backend
        got = model(tokens, documents)[..., : SHAPE.vocab]
        # Rotary positions count from the row's start: attention sees only differences, so this is exact but for rounding.
        torch.testing.assert_close(got, reference, atol=1e-6, rtol=0)
        for g, w in zip(_gradients(model, (got * weights).sum()), wanted, strict=True):
            torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)
    model.backend = "flex"  # no backward pass on a CPU
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, documents)[..., : SHAPE.vocab], reference, atol=1e-6, rtol=0)


def test_documents_are_really_masked_from_each_other() -> None:
    model = _model()
    tokens, documents = _rows([[10, 22]])
    assert (model(tokens, documents)[:, 10:, : SHAPE.vocab] - model(tokens)[:, 10:, : SHAPE.vocab]).abs().max() > 1e-3


def test_no_position_sees_the_future() -> None:
    model = _model()
    tokens, documents = _rows([[20, 12]])
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % SHAPE.vocab
    for given in (None, documents):
        a, b = model(tokens, given), model(changed, given)
        assert torch.equal(a[:, :15], b[:, :15])
        assert not torch.equal(a[:, 15:20], b[:, 15:20])


def test_short_rows_use_one_mask_and_long_rows_one_call_a_document() -> None:
    assert attention_backend("cpu", 128) == "dense"
    assert attention_backend("cpu", 256) == attention_backend("cpu", 4096) == "documents"
    assert attention_backend("cuda", 256) == attention_backend("cuda:1", 4096) == "flex"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_padding_of_the_vocabulary_is_never_predicted_and_never_trained(tied: bool) -> None:
    model = _model(replace(SHAPE, tied=tied))
    tokens, documents = _rows([[16, 16]])
    logits = model(tokens, documents)
    assert logits.shape[-1] == SHAPE.padded_vocab == 128
    assert torch.isneginf(logits[..., SHAPE.vocab :]).all()
    assert logits[..., : SHAPE.vocab].isfinite().all()
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for matrix in (model.embedding, model.head):
        if matrix is not None:
            assert (matrix.weight[SHAPE.vocab :] == 0).all()
            assert (matrix.weight.grad[SHAPE.vocab :] == 0).all()
            assert (matrix.weight.grad[: SHAPE.vocab].abs().sum(1) > 0).sum() > 16


def test_initial_values_follow_the_table() -> None:
    shape = Shape(width=256, layers=2, heads=4, kv_heads=2, head_dim=64, ff=640, vocab=3000, base_width=64, tied=False)
    model = Transformer(shape, Parametrization())
    model.init_weights(7)
    for name, p in model.named_parameters():
        if model.roles[name] in NORMS:
            assert (p == 1).all()
            continue
        wanted = {"embedding.weight": 0.1, "head.weight": 0.1}.get(name, 0.1 / 2)
        drawn = p[: shape.vocab] if name in ("embedding.weight", "head.weight") else p
        n = drawn.numel()
        assert abs(drawn.mean().item()) < 5 * wanted / n**0.5, name
        assert abs(drawn.std().item() / wanted - 1) < 5 / (2 * n) ** 0.5, name
        assert abs((drawn / wanted).pow(4).mean().item() - 3) < 5 * (96 / n) ** 0.5, name  # a normal distribution


def test_initial_values_depend_on_seed_and_name_only() -> None:
    model = _model(dtype=torch.float32)
    values = dict(model.named_parameters())
    deeper = _model(replace(SHAPE, layers=3, vocab=101), dtype=torch.float32)
    assert torch.equal(deeper.layers[1].mlp.up.weight, values["layers.1.mlp.up.weight"])
    assert torch.equal(deeper.embedding.weight[:100], values["embedding.weight"][:100])
    a, b = values["layers.0.attention.key.weight"], values["layers.1.attention.key.weight"]
    assert not torch.equal(a, b)
    model.init_weights(1)
    assert not torch.equal(a, _model(dtype=torch.float32).layers[0].attention.key.weight)
    model.init_weights(0)
    assert torch.equal(a, _model(dtype=torch.float32).layers[0].attention.key.weight)


def test_with_qk_norm_the_size_of_query_and_key_matrices_does_not_matter() -> None:
    """Each head's query and key are normalised, so that a factor on their matrices changes nothing but rounding."""
    tokens, documents = _rows([[20, 12]])
    for qk_norm, change in ((True, 0.0), (False, 1e-3)):
        model = _model(replace(SHAPE, qk_norm=qk_norm, norm_eps=1e-12))
        before = model(tokens, documents)[..., : SHAPE.vocab]
        with torch.no_grad():
            model.layers[0].attention.query.weight *= 3.0
            model.layers[1].attention.key.weight *= 0.2
        difference = (model(tokens, documents)[..., : SHAPE.vocab] - before).abs().max().item()
        assert (difference > change) if change else (difference < 1e-6)


def test_roles_survive_a_deep_copy_and_leaving_the_meta_device() -> None:
    model = Transformer(SHAPE, Parametrization(), device="meta")
    roles = model.roles
    real = copy.deepcopy(model).to_empty(device="cpu")
    assert real.roles == roles
    real.init_weights(0)
    tokens, _ = _rows([[32]])
    assert torch.equal(real(tokens), _model(dtype=torch.float32)(tokens))  # buffers are filled again as well


def test_the_cache_gives_what_the_whole_row_gives() -> None:
    model = _model()
    tokens, _ = _rows([[32], [32]])
    with torch.no_grad():
        whole, cache = model(tokens), KeyValueCache(model, 32, 2)
        parts = [model.logits(model.hidden(part, cache=cache)) for part in tokens.split([9, 1, 1, 14, 1, 6], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)


def test_bf16_is_close_and_leaves_the_weights_alone() -> None:
    exact, model = _model(dtype=torch.float32), _model(dtype=torch.float32)
    model.compute_dtype = torch.bfloat16
    tokens, documents = _rows([[20, 12]])
    logits = model(tokens, documents)
    assert logits.dtype == torch.float32
    assert model.hidden(tokens, documents).dtype == torch.bfloat16
    reference = exact(tokens, documents)[..., : SHAPE.vocab]
    difference = (logits[..., : SHAPE.vocab] - reference).abs().max()
    assert 0 < difference < 0.05 * reference.abs().max()
    logits[..., : SHAPE.vocab].sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_multipliers_and_shapes_share_one_compiled_graph() -> None:
    """Models that differ in multipliers, seed and documents run the same code; each is what eager gives."""
    torch.compiler.reset()
    count = []

    def backend(graph, inputs):
        count.append(1)
        return graph.forward

    def loss(model, tokens, documents):
        return model(tokens, documents)[..., : SHAPE.vocab].square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend=backend)
    model = _model(dtype=torch.float32)
    for seed, options in enumerate([{}, {"scale_emb": 3.0}, {"scale_depth": 0.5, "init_std": 0.02}]):
        model.set_parametrization(Parametrization(**options))
        model.init_weights(seed)
        tokens, documents = _rows([[5, 27], [11, 21]], seed)
        torch.testing.assert_close(compiled(model, tokens, documents), loss(model, tokens, documents))
    assert len(count) == 1


@pytest.mark.parametrize("backend", ["dense", "documents"])
def test_compiled_gradients_equal_eager_ones(backend) -> None:
    model = _model(dtype=torch.float32)
    model.backend = backend
    tokens, documents = _rows([[5, 27], [11, 21]])

    def loss(model, tokens, documents):
        return F.cross_entropy(model(tokens, documents).flatten(0, 1), tokens.flatten())

    wanted = _gradients(model, loss(model, tokens, documents))
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    for g, w in zip(_gradients(model, compiled(model, tokens, documents)), wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=1e-4)
