"""Wrong recipes: each gives one line with file, line, key, expectation and value received, before any work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from windtunnel import cli
from windtunnel.base.errors import RecipeError
from windtunnel.recipe import load_recipe

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
GOOD = """\
name = "good"
seed = 3

[corpus.text]
source = "text.txt"

[corpus.more]
source = ["a.jsonl", "b/*.md"]

[tokenizer]
vocab = 2048

[model]
family = "tiny"
size = "0.3M"
row = 128

[tunnel]
proxies = ["0.02M", "0.05M", "0.1M"]
tokens = ["0.8M", "1.6M", "3.2M"]

[trunk]
tokens = "6.4M"
batch = 2048
mixture = { text = 2, more = 1 }

[branch.same]
tokens = "10%"

[branch.better]
tokens = "10%"
mixture = { more = 1 }
"""

LAST, CHAT = "mixture = { more = 1 }\n", '\n[branch.chat]\nkind = "sft"\n'
FAR = '\n[branch.far]\nkind = "long"\n{}context = {{ row = 2048 }}\n\n[branch.farther]\nkind = "long"\nparent = "far"\n'

RAMP = "batch = 2048\nbatch_schedule = "
# (line of GOOD to replace, what stands there instead, words of the message)
LINES = [
    ("batch = 2048", RAMP + '[{ after = "50%", batch = 4096 }]', "batch_schedule[1]: expected a length of its own, got the share"),
    ("batch = 2048", RAMP + '[{ after = "9M", batch = 4096 }]', "expected a change before trunk.tokens = 6.4M, got 9M"),
    ("batch = 2048", RAMP + '[{ after = "1M", batch = 4000 }]', "batch_schedule[1]: expected a multiple of model.row"),
    ("batch = 2048", RAMP + '[{ after = 2000, batch = 4096 }]', "expected a change after the warmup of 64k tokens, got 2k"),
    ("batch = 2048", 'batch_schedule = [{ after = "1M", batch = 4096 }]', "expected trunk.batch beside a schedule, got none"),
    ("batch = 2048", RAMP + '[{ after = "1M", batch = 4096 }, { after = "1M", batch = 8192 }]',
     "batch_schedule[2]: expected a change after the change before it, at 1M tokens, got 1M"),
    ('name = "good"', "name = 3", "name: expected a text in quotes, got 3"),
    ('name = "good"', 'name = ""', "name: expected"),
    ('name = "good"', 'name = "a/b"', "name: expected a name of letters"),
    ('name = "good"', 'name = "../up"', "name: expected a name of letters"),
    ('name = "good"', 'name = "con"', "name: expected a name of letters"),
    ('name = "good"', 'nane = "good"', "expected"),
    ("seed = 3", 'seed = "3"', "seed: expected a whole number, got '3'"),
    ("seed = 3", "seed = 3.5", "seed: expected a whole number, got 3.5"),
    ("seed = 3", "seed = true", "seed: expected a whole number, got true"),
    ("seed = 3", "seed = -1", "seed: expected a number of at least 0, got -1"),
    ("seed = 3", "seed = 99999999999999999999999", "seed: expected a"),
    ("seed = 3", "seed = [1]", "seed: expected a whole number, got [1]"),
    ("seed = 3", "seed = { a = 1 }", "seed: expected a whole number, got a table"),
    ("seed = 3", "seed = 1979-05-27", "seed: expected a whole number"),
    ("seed = 3", "sed = 3", "sed: expected a known key, got an unknown one; did you mean 'seed'?"),
    ("seed = 3", "max_loss = nan", "max_loss: expected a finite number, got nan"),
    ("seed = 3", "max_hours = 0", "max_hours: expected a number above 0, got 0"),
    ("seed = 3", "max_cost = 5", "max_cost: expected a price"),
    ("seed = 3", 'track = "wandb"', "track: expected a list, got 'wandb'"),
    ("seed = 3", 'track = ["wandb", "mlflow"]', "track[2]: expected"),
    ("[corpus.text]", "[corpus.'a b']", "expected a name of letters"),
    ("[corpus.text]", "[corpora.text]", "did you mean 'corpus'?"),
    ("[corpus.text]", "[corpus.texts]", "trunk.mixture: expected a corpus of this recipe, got 'text'; did you mean 'texts'?"),
    ('source = "text.txt"', "source = 5", "corpus.text.source: expected"),
    ('source = "text.txt"', "source = []", "corpus.text: expected a path"),
    ('source = "text.txt"', 'sources = "x"', "expected"),
    ('source = "text.txt"', 'source = "x"\nformat = "docx"', "corpus.text.format: expected"),
    ('source = "text.txt"', 'source = "x"\nheldout = 1', "corpus.text.heldout: expected a number below 1, got 1"),
    ('source = "text.txt"', 'source = "x"\nheldout = 0', "corpus.text.heldout: expected a number above 0"),
    ('source = "text.txt"', 'source = "x"\nsha256 = "abc"', "corpus.text.sha256: expected"),
    ('source = "text.txt"', 'source = "x"\nuser = "{{ a }}"', "corpus.text: expected 'user' and 'assistant' together"),
    ('source = "text.txt"', 'source = "x"\nclean = { exact = 1 }', "corpus.text.clean.exact: expected true or false, got 1"),
    ('source = "text.txt"', 'source = "x"\nclean = { exakt = true }', "did you mean 'exact'?"),
    ('source = "text.txt"', 'source = "x"\nmetadata = 1', "corpus.text.metadata: expected a known key"),
    ("vocab = 2048", "vocab = 260", "tokenizer.vocab: expected a number of at least 261, got 260"),
    ("vocab = 2048", "vocab = 10000000", "tokenizer.vocab: expected a number of at most 262144"),
    ("vocab = 2048", 'vocab = "2k"', "tokenizer.vocab: expected a whole number, got '2k'"),
    ("vocab = 2048", "voacb = 2048", "did you mean 'vocab'?"),
    ("vocab = 2048", "corpora = []", "tokenizer.corpora: expected at least 1, got none"),
    ("vocab = 2048", 'corpora = ["txt"]', "tokenizer.corpora: expected a corpus of this recipe, got 'txt'; did you mean 'text'?"),
    ('family = "tiny"', 'family = "tin"', "model.family: expected 'tiny', 'tiny-wide' or 'minicpm', got 'tin'; did you mean 'tiny'?"),
    ('family = "tiny"', 'family = ["tiny"]', "model.family: expected 'tiny', 'tiny-wide' or 'minicpm'"),
    ('family = "tiny"', 'family = "minicpm"', "model.size: expected a size of the family 'minicpm'"),
    ('size = "0.3M"', "size = 300000", "model.size: expected a text in quotes, got 300000"),
    ('size = "0.3M"', 'size = "7B"', "model.size: expected a size of the family 'tiny', got 7B; choose '2.5M'"),
    ('size = "0.3M"', 'size = "big"', "model.size: expected a count such as 6400000 or '6.4M', got 'big'; sizes of 'tiny': 0.02M"),
    ('size = "0.3M"', 'size = "0.05M"', "model.size: expected a target at least as large as the largest proxy"),
    ('size = "0.3M"', "", "expected a size, a shape or a [budget], got none"),
    ('size = "0.3M"', 'size = "0.3M"\nshape = { width = 96, layers = 3 }', "expected one of size, shape and budget"),
    ('size = "0.3M"', "shape = { width = 100, layers = 3 }", "model.shape.width: expected a multiple of the head dimension 16"),
    ('size = "0.3M"', "shape = { width = 96, layers = 0 }", "model.shape.layers: expected a number of at least 1, got 0"),
    ('size = "0.3M"', "shape = { width = 96 }", "model.shape.layers: expected a value, got none"),
    ('size = "0.3M"', "shape = { width = 96, layers = 3, heads = 5 }", "model.shape.heads: expected width / head dimension = 6, got 5"),
    ('size = "0.3M"', "shape = { width = 96, layers = 3, kv_heads = 4 }", "model.kv_heads: expected a divisor of the 6 query heads, got 4"),
    ('size = "0.3M"', "shape = { width = 96, layers = 3, depth = 4 }", "model.shape.depth: expected a known key"),
    ("row = 128", "row = 4096", "model.row: expected at most the 2048 positions of 'tiny', got 4096"),
    ("row = 128", "row = 2", "model.row: expected a number of at least 8, got 2"),
    ("row = 128", "row = 100", "trunk.batch: expected a multiple of model.row = 100, got 2048"),
    ("row = 128", "tied = 1", "model.tied: expected true or false, got 1"),
    ("row = 128", "init_std = -1", "model.init_std: expected a number above 0, got -1"),
    ("row = 128", "scale_emb = inf", "model.scale_emb: expected a finite number, got inf"),
    ("row = 128", 'parametrization = "mu"', "did you mean 'mup'?"),
    ("row = 128", "base_width = 0", "model.base_width: expected a number of at least 1, got 0"),
    ('proxies = ["0.02M", "0.05M", "0.1M"]', 'proxies = ["0.02M", "0.05M"]', "tunnel.proxies: expected at least 3, got 2"),
    ('proxies = ["0.02M", "0.05M", "0.1M"]', 'proxies = ["0.02M", "0.02M", "0.1M"]', "tunnel.proxies: expected different sizes"),
    ('proxies = ["0.02M", "0.05M", "0.1M"]', 'proxies = ["0.02M", "0.05M", "9B"]', "tunnel.proxies: expected a size of the family"),
    ('proxies = ["0.02M", "0.05M", "0.1M"]', 'proxies = "0.02M"', "tunnel.proxies: expected a list, got '0.02M'"),
    ('proxies = ["0.02M", "0.05M", "0.1M"]', "proxies = [1, 2, 3]", "tunnel.proxies[1]: expected a text in quotes, got 1; write"),
    ('proxies = ["0.02M", "0.05M", "0.1M"]', "trials = 4", "tunnel.proxies: expected a value, got none"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M"]', "tunnel.tokens: expected at least 3, got 2"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["1M", "1M", "2M"]', "tunnel.tokens: expected different lengths"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["10%", "20%", "30%"]', "tunnel.tokens: expected lengths in tokens, got '10%'"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["1M", "2M", "x"]', "tunnel.tokens[3]: expected a count"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["1M", "2M", "3M"]\ntrials = -1', "tunnel.trials: expected a number of at least 0"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["1M", "2M", "3M"]\ncheck_size = "0.02M"', "tunnel.check_size: expected a wider model"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["1M", "2M", "3M"]\nsearch_size = "1T"', "tunnel.search_size: expected a size"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = {}', 'tunnel.space: expected one axis or more, got none; write for example learning_rate'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { learning_rate = [0.1, 0.01] }', 'tunnel.space.learning_rate: expected 0 < low < high, got 0.1 and 0.01'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { learning_rate = [0.01, 0.01] }', 'tunnel.space.learning_rate: expected 0 < low < high'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { learning_rate = [0.01] }', 'tunnel.space.learning_rate: expected at least 2, got 1'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { learning_rate = [1, 2, 3] }', 'tunnel.space.learning_rate: expected at most 2, got 3'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { learning_rate = 0.01 }', 'tunnel.space.learning_rate: expected a list'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { beta2 = [0.9, 1.5] }', 'tunnel.space.beta2: expected values between 0.1 and 0.999999, got 0.9 and 1.5'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { warmup = [0.1, 0.9] }', 'tunnel.space.warmup: expected values between 0.0001 and 0.5'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { weight_decay = [0, 0.1] }', 'tunnel.space.weight_decay[1]: expected a number above 0'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { lr = [0.01, 0.1] }', 'tunnel.space.lr: expected a known key, got an unknown one; known here: learning_rate'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { learning_rate = [0.01, 0.1] }\ntrials = 0', 'tunnel.space: expected trials that search it, got tunnel.trials = 0'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { optimizer = ["adam"] }', 'tunnel.space.optimizer[1]: expected'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { optimizer = ["muon"] }', 'tunnel.space.optimizer: expected two different options or more, got [muon]'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { qk_norm = [true, true] }', 'tunnel.space.qk_norm: expected two different options'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nspace = { decay = [] }', 'tunnel.space.decay: expected two different options or more'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nnoise = 0', 'tunnel.noise: expected a number above 0'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nnoise = 1', 'tunnel.noise: expected a number below 1'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nrepeats = 1', 'tunnel.repeats: expected a number of at least 2'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nstop = "never"', "tunnel.stop: expected 'trials' or 'enough', got 'never'"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nsampler = "latin"', "tunnel.sampler: expected 'tpe', 'gp', 'sobol', 'random' or 'grid', got 'latin'"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\non_edge = "extend"', "tunnel.on_edge: expected 'say', 'widen' or 'refuse', got 'extend'"),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\non_edge = "widen"\nprune = "halving"\nspace = { warmup = [0.01, 0.1] }', 'tunnel.on_edge: expected "say" or "refuse" where trials end early and the warmup is searched, got "widen"'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["0.8M", "1.6M", "3.2M"]\nper_round = 0', 'tunnel.per_round: expected a number of at least 1'),
    ('tokens = ["0.8M", "1.6M", "3.2M"]', 'tokens = ["1M", "2M", "3M"]\nforms = ["cubic"]', "tunnel.forms[1]: expected"),
    ('tokens = "6.4M"', "tokens = 0", "trunk.tokens: expected a positive whole number, got '0'"),
    ('tokens = "6.4M"', 'tokens = "-5"', "trunk.tokens: expected"),
    ('tokens = "6.4M"', 'tokens = "6.4Q"', "trunk.tokens: expected a count"),
    ('tokens = "6.4M"', 'tokens = "50%"', "trunk.tokens: expected a length of its own, got the share 50%"),
    ('tokens = "6.4M"', 'tokens = "5 parsecs"', "trunk.tokens: expected a length such as"),
    ('tokens = "6.4M"', "tokens = true", "trunk.tokens: expected a length such as"),
    ('tokens = "6.4M"', "tokens = 1000", "trunk.tokens: expected at least one step of 2048 tokens, got 1000"),
    ('tokens = "6.4M"', 'tokens = "6.4M"\nwarmup = "7M"', "trunk.warmup: expected less than trunk.tokens = 6.4M, got 7M"),
    ('tokens = "6.4M"', 'tokens = "6.4M"\nwarmup = "150%"', "trunk.warmup: expected a share above 0% and up to 100%"),
    ('tokens = "6.4M"', 'tokens = "6.4M"\nkeep = 0', "trunk.keep: expected a number of at least 1, got 0"),
    ("batch = 2048", "batch = 2000", "trunk.batch: expected a multiple of model.row = 128, got 2000; write 2048 for 16 rows"),
    ("batch = 2048", "batch = 0.5", "trunk.batch: expected a positive whole number, got 0.5"),
    ("mixture = { text = 2, more = 1 }", "mixture = { text = 2, mroe = 1 }", "trunk.mixture: expected a corpus of this recipe, got 'mroe'"),
    ("mixture = { text = 2, more = 1 }", "mixture = { text = 0 }", "trunk.mixture.text: expected a number above 0, got 0"),
    ("mixture = { text = 2, more = 1 }", 'mixture = { text = "2" }', "trunk.mixture.text: expected a number, got '2'"),
    ("mixture = { text = 2, more = 1 }", "mixture = {}", "trunk.mixture: expected at least 1, got none"),
    ("mixture = { text = 2, more = 1 }", "", "trunk.mixture: expected weights for 2 corpora, got none"),
    ("[branch.same]", "[branch.trunk]", "branch.trunk: expected a name other than the trunk's"),
    ("[branch.same]", "[branches.same]", "did you mean 'branch'?"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\ntokens = "100%"', "branch.same.tokens: expected less than trunk.tokens"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\ntokens = "7M"', "branch.same.tokens: expected less than trunk.tokens = 6.4M, got 7M"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nfloor = 1', "branch.same.floor: expected a number below 1, got 1"),
    ('[branch.same]\ntokens = "10%"', "[branch.same]\nfloor = 0.0", "branch.same.floor: expected a floor above 0"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nform = "quadratic"', "branch.same.form: expected"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nform = "linear"\nhalf_life = "5 steps"', "expected form = 'exponential'"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nparent = "better"', "branch.same.parent: expected 'trunk'"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nkind = "rl"', "branch.same.kind: expected 'decay', 'moe', 'long', 'sft', 'dpo', 'adapt' or 'soup', got 'rl'"),
    (LAST, LAST + CHAT + 'parent = "same"\nat = "10%"\nmixture = { more = 1 }', "branch.chat.at: expected a step of 'same', got 10%"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nkind = "sft"', "branch.same.parent: expected a branch that stands above, got 'trunk'"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nlr = 0.001', "branch.same.lr: expected it beside kind = 'sft', 'dpo' or 'adapt', got kind = 'decay'"),
    (LAST, LAST + CHAT + 'parent = "beter"\nmixture = { more = 1 }', "branch.chat.parent: expected a branch that stands above, got 'beter'; did you mean 'better'?"),
    (LAST, LAST + CHAT + 'parent = "better"', "branch.chat.mixture: expected weights of corpora, got none"),
    (LAST, LAST + CHAT + 'parent = "better"\nmixture = { more = 1 }', "branch.chat.mixture: expected at least one corpus of chats, got none"),
    (LAST, LAST + CHAT.replace("sft", "dpo") + 'parent = "better"\nloss = "simpo"\nreference = "live"\nmixture = { more = 1 }', "branch.chat.reference: expected none, since simpo has no reference, got 'live'; leave it out"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nreference = "live"', "branch.same.reference: expected it beside kind = 'dpo', got kind = 'decay'"),
    (LAST, LAST + '[branch.mean]\nkind = "soup"', "branch.mean.of: expected what to average, got none; write for example of = [\"chat\", \"aligned\"]"),
    (LAST, LAST + '[branch.mean]\nkind = "soup"\nof = ["better", "beter"]', "branch.mean.of: expected branches that stand above, got 'beter'; did you mean 'better'?"),
    (LAST, LAST + '[branch.mean]\nkind = "soup"\nof = ["better"]', "branch.mean.of: expected two different branches or more, got better; or the trunk alone"),
    (LAST, LAST + '[branch.mean]\nkind = "soup"\nof = ["same", "trunk"]', "branch.mean.of: expected branches that stand above, got 'trunk'; the trunk is averaged alone: of = [\"trunk\"]"),
    (LAST, LAST + '[branch.mean]\nkind = "soup"\nof = ["trunk"]\nweights = [1.0, 2.0]', "branch.mean.weights: expected 4 weights, one for each member, got 2"),
    (LAST, LAST + '[branch.mean]\nkind = "soup"\nof = ["same", "better"]\nlast = 3', "branch.mean.last: expected it beside of = ['trunk'], got same, better; leave it out"),
    (LAST, LAST + '[branch.mean]\nkind = "soup"\nof = ["same", "better"]\nmixture = { more = 1 }', "branch.mean.mixture: expected it beside kind = 'decay', 'moe', 'long', 'sft', 'dpo' or 'adapt', got kind = 'soup'"),
    (LAST, LAST + '[branch.mean]\nkind = "soup"\nparent = "same"\nof = ["same", "better"]', "branch.mean.parent: expected none beside kind = 'soup', got 'same'; of names what it averages"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nlora = { rank = 4 }', "branch.same.lora: expected it beside kind = 'sft', 'dpo' or 'adapt', got kind = 'decay'"),
    (LAST, LAST + CHAT + 'parent = "better"\nlora = { rank = 4096 }\nmixture = { more = 1 }', "branch.chat.lora.rank: expected a rank below the model's width"),
    (LAST, LAST + CHAT + 'parent = "better"\nlora = { rank = 0 }\nmixture = { more = 1 }', "branch.chat.lora.rank: expected"),
    (LAST, LAST + CHAT + 'parent = "better"\nhalf_life = "9 steps"\nmixture = { more = 1 }', "branch.chat.half_life: expected it beside kind = 'decay', 'moe' or 'long', got kind = 'sft'"),
    (LAST, LAST + CHAT + 'parent = "better"\nepochs = 2\ntokens = "1M"\nmixture = { more = 1 }', "branch.chat.epochs: expected tokens or epochs, got both"),
    (LAST, LAST + CHAT + 'parent = "better"\nepochs = 0\nmixture = { more = 1 }', "branch.chat.epochs: expected a number above 0, got 0"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nexperts = { count = 4 }', "branch.same.experts: expected kind = 'moe' beside experts, got 'decay'"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nstable = "5%"', "branch.same.stable: expected kind = 'moe' or 'long' beside a stable part, got 'decay'"),
    ("mixture = { more = 1 }", "kind = 'moe'\nexperts = { count = 4, top_k = 5 }", "branch.better.experts.top_k: expected at most the 4 experts, got 5"),
    ("mixture = { more = 1 }", "kind = 'moe'\nexperts = { count = 1 }", "branch.better.experts.count: expected a number of at least 2, got 1"),
    ("mixture = { more = 1 }", "kind = 'long'", "branch.better.context: expected its rows, got none"),
    ("mixture = { more = 1 }", "kind = 'long'\ncontext = { row = 100 }", "branch.better.context.row: expected more than its parent's"),
    ("mixture = { more = 1 }", "kind = 'long'\nparent = 'same'\ncontext = { row = 1024 }", "branch.better.parent: expected the trunk or a long branch"),
    ("mixture = { more = 1 }", "kind = 'long'\nbatch = 1500\ncontext = { row = 1024 }", "branch.better.batch: expected a multiple of context.row = 1024"),
    ("mixture = { more = 1 }", "kind = 'long'\ncontext = { row = 1024, scaling = 'none', factor = 4 }", "branch.better.context.factor: expected a scaling"),
    ("mixture = { more = 1 }", "kind = 'long'\ncontext = { row = 1024, dynamic_ntk = '0.5@64' }", "branch.better.context.dynamic_ntk: expected FACTOR or FACTOR@TOKENS, such as 4 or 4@65536, got '0.5@64'; a factor is 1 or more"),
    ("mixture = { more = 1 }", "kind = 'long'\ncontext = { row = 1024, scaling = 'yarn', dynamic_ntk = '4' }", "branch.better.context.dynamic_ntk: expected it beside scaling 'none' or 'ntk', got 'yarn'"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nbatch_schedule = [{ after = "1M", batch = "8k" }]', "branch.same.batch_schedule: expected kind = 'moe' or 'long' beside a batch schedule, got 'decay'"),
    ("mixture = { more = 1 }", "kind = 'moe'\nbatch_schedule = [{ after = '1M', batch = 1000 }]", "branch.better.batch_schedule[1]: expected a multiple of model.row"),
    ("mixture = { more = 1 }", "kind = 'moe'\nbatch_schedule = [{ after = '10%', batch = 8192 }]", "branch.better.batch_schedule[1]: expected a length of its own, got the share 10%; write tokens or steps"),
    ("mixture = { more = 1 }", "kind = 'moe'\nbatch_schedule = [{ after = '9k', batch = 8192 }, { after = '9k', batch = 4096 }]", "branch.better.batch_schedule[2]: expected a change after the one before it, at 9k, got 9k"),
    ("mixture = { more = 1 }", "kind = 'moe'\nbatch_schedule = [{ after = '9k', batch = 8192 }, { after = '9 steps', batch = 4096 }]", "branch.better.batch_schedule[2]: expected a length like the one before it, 9k, got 9 steps; write all in tokens"),
    (LAST, LAST + FAR.format("") + "context = { row = 4096 }", "branch.farther.parent: expected a parent that does not decay, got 'far'"),
    (LAST, LAST + FAR.format('stable = "5%"\n') + 'at = "1M"\ncontext = { row = 4096 }', "branch.farther.at: expected a step of 'far', got 1M"),
    (LAST, LAST + FAR.format('stable = "5%"\n') + "context = { row = 2048 }", "branch.farther.context.row: expected more than its parent's 2048"),
    ("mixture = { more = 1 }", "kind = 'moe'\nexperts = { drop = 1.5 }", "branch.better.experts.drop: expected a number of at most 1, got 1.5"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nat = "9M"', "branch.same.at: expected a point on the trunk of 6.4M tokens, got 9M"),
    ('[branch.same]\ntokens = "10%"', '[branch.same]\nat = "0.1%"', "branch.same.at: expected a point after the warmup"),
    ('[branch.same]\ntokens = "10%"', "[branch.same]\nmixture = { more = 1 }", "expected a decay on the trunk's own mixture"),
    ("mixture = { more = 1 }", "mixture = { none = 1 }", "branch.better.mixture: expected a corpus of this recipe, got 'none'"),
    ("mixture = { more = 1 }", "batch = 128", "branch.better.batch: expected none, since a decay goes on with the trunk's batch"),
    ("mixture = { more = 1 }", "[evaluate]\ncorpora = ['x']", "evaluate.corpora: expected a corpus of this recipe, got 'x'"),
    ("mixture = { more = 1 }", "[evaluate]\ntasks = { 'a b' = 'x' }", "expected a name of letters"),
    ("mixture = { more = 1 }", "[export]\nbranch = 'bettr'", "export.branch: expected a branch of this recipe, got 'bettr'; did you mean 'better'?"),
    ("mixture = { more = 1 }", "[export]\nformat = 'gguf'", "export.format: expected 'llama', got 'gguf'"),
    ("mixture = { more = 1 }", "[machine]\ncount = 0", "machine.count: expected a number of at least 1, got 0"),
    ("mixture = { more = 1 }", "[machine]\nprice = -1", "machine.price: expected a number of at least 0, got -1"),
    ("mixture = { more = 1 }", '[optimizer]\nweight_decay = 0\n[tunnel.space]\ndecay = ["plain", "independent"]',
     "tunnel.space.decay: expected a weight decay that can have several forms, got optimizer.weight_decay = 0; leave one of them out"),
    ("mixture = { more = 1 }", "[optimizer]\nlr = 0", "optimizer.lr: expected a number above 0, got 0"),
    ("mixture = { more = 1 }", "[optimizer]\nbeta1 = 1.0", "optimizer.beta1: expected a number below 1, got 1.0"),
    ("mixture = { more = 1 }", "[optimizer]\nlearning_rate = 0.1", "optimizer.learning_rate: expected a known key"),
    ("row = 128", "row = 128\nbase_layers = 4", "model.base_layers: expected parametrization = 'completep', got 'mup'"),
    ("row = 128", 'row = 128\nparametrization = "standard"\nvocabulary_regime = "large"', "model.vocabulary_regime: expected 'fixed' with parametrization = 'standard', which knows no width"),
    ("mixture = { more = 1 }", "[optimizer]\ndecay = 'plane'", "optimizer.decay: expected 'plain' or 'independent', got 'plane'"),
    ("mixture = { more = 1 }", "[optimizer]\ndecay = 'independent'", "optimizer.decay: expected weight_decay beside independent decay"),
    ("mixture = { more = 1 }", "[budget]\nhours = 1", "budget: expected one of size, shape and budget, got model.size and budget"),
]  # fmt: skip
BUDGETS = [
    ("[budget]", "budget: expected exactly one of hours, gpu_hours, flops and money, got none"),
    (
        "[budget]\nhours = 1\nflops = 1e18",
        "budget: expected exactly one of hours, gpu_hours, flops and money, got hours and flops",
    ),
    ("[budget]\nmoney = 1", "budget.money: expected a price"),
    ("[budget]\nhours = 0", "budget.hours: expected a number above 0, got 0"),
    ("[budget]\nflops = 'many'", "budget.flops: expected a count"),
    ("[budget]\nhours = 1\nlaw = 'chinchilla'", "budget.law: expected"),
]
FILES = {
    "empty": b"",
    "blank": b" \n\n",
    "comments": b"# nothing\n",
    "latin1": "name = 'Gr\xfc\xdfe'\n".encode("latin-1"),
    "utf16": "name = 'x'\n".encode("utf-16"),
    "nul": b"name = 'a\x00b'\n",
    "binary": bytes(range(256)) * 4,
    "huge": b"# " + b"x" * (2 << 20),
    "unclosed": b'name = "x\n',
    "unclosed table": b"[corpus.text\nsource = 'x'\n",
    "unclosed array": b"name = 'x'\ntrack = [\n",
    "no value": b"name =\n",
    "no equals": b"name 'x'\n",
    "duplicate key": b"name = 'x'\nseed = 1\nseed = 2\n",
    "duplicate table": b"name = 'x'\n[trunk]\n[trunk]\n",
    "json": b'{"name": "x"}',
    "yaml": b"name: x\ncorpus:\n  text: y\n",
    "nested": b"a = " + b"[" * 50_000,
    "long number": b"seed = " + b"9" * 6000 + b"\n",
    "scalar for table": b"name = 'x'\ncorpus = 3\n",
    "list for table": b"name = 'x'\n[[corpus]]\nsource = 'x'\n",
    "only a name": b"name = 'x'\n",
    "no name": b"[corpus.a]\nsource = 'x'\n[model]\nsize = '9M'\n",
}


def one_line(text: str) -> None:
    assert text
    assert "\n" not in text
    assert len(text) < 600
    assert "Traceback" not in text


def write(folder: Path, old: str, new: str) -> tuple[Path, int]:
    """A recipe with one line replaced, and the number of that line."""
    assert GOOD.count(old) == 1, old
    file = folder / "bad.toml"
    file.write_text(GOOD.replace(old, new), encoding="utf-8")
    return file, GOOD[: GOOD.index(old)].count("\n") + 1


def test_the_recipe_that_the_others_spoil_is_good(tmp_path: Path) -> None:
    file, _ = write(tmp_path, "seed = 3", "seed = 4")
    assert load_recipe(file).seed == 4


def test_there_are_over_a_hundred_of_them() -> None:
    assert len(LINES) + len(BUDGETS) + len(FILES) > 140


@pytest.mark.parametrize(("old", "new", "words"), LINES)
def test_a_wrong_line_is_named_in_one_line(
    old: str, new: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, number = write(tmp_path, old, new)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    message = str(caught.value)
    one_line(message)
    assert words in message
    place, _, rest = message.removeprefix(str(file)).partition(": ")
    line = int(place.removeprefix(":") or 0)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert 0 <= line <= len(lines)
    # The line named holds the key named; it is the spoilt one, or the other side of the contradiction.
    key = rest.partition(": ")[0].split(".")[-1].partition("[")[0]
    assert line == 0 or number <= line <= number + 2 or key in lines[line - 1] or "[" in lines[line - 1], message
    assert cli._run(["plan", str(file)]) == 2
    assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(("table", "words"), BUDGETS)
def test_a_wrong_budget_is_named(table: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(GOOD.replace('size = "0.3M"\n', "") + table + "\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    one_line(str(caught.value))
    assert words in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(FILES[name])
    assert cli._run(["run", str(file)]) == 2
    line = capsys.readouterr().err
    one_line(line.rstrip("\n"))
    assert line.startswith(str(file))
    assert "expected" in line


@pytest.mark.parametrize(
    ("axis", "table"),
    [
        ("learning_rate", "[optimizer]\nlr = 0.01"), ("weight_decay", "[optimizer]\nweight_decay = 0.1"),
        ("beta2", "[optimizer]\nbeta2 = 0.95"), ("init_std", "init_std = 0.1"), ("warmup", 'warmup = "1%"'),
    ],
)  # fmt: skip
def test_a_hyper_parameter_is_either_stated_or_searched(axis: str, table: str, tmp_path: Path) -> None:
    """A space that contains what the recipe fixes contradicts itself; a default that nobody wrote does not."""
    low, high = (0.9, 0.99) if axis == "beta2" else (0.01, 0.1)
    good = GOOD.replace("[trunk]", f"space = {{ {axis} = [{low}, {high}] }}\n\n[trunk]")
    file = tmp_path / "space.toml"
    file.write_text(good, encoding="utf-8")
    assert load_recipe(file).tunnel
    spoilt = {"init_std = 0.1": good.replace("row = 128", "row = 128\n" + table)}.get(
        table,
        good.replace("batch = 2048", "batch = 2048\n" + table) if "warmup" in table else good + "\n" + table + "\n",
    )
    file.write_text(spoilt, encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"tunnel\.space.*: expected a value that the recipe leaves open, but .* states it"
    ):
        load_recipe(file)


def test_duplicate_keys_name_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(FILES["duplicate key"])
    with pytest.raises(RecipeError, match=r"bad\.toml:3: expected TOML: the key 'seed' stands twice, first on line 2"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qickstart", "did you mean 'quickstart'?"), ("absent.toml", "found nothing there"), ("", "expected a"), (".", "a folder"),
        ("a\0b.toml", "expected a recipe file"), ("x" * 5000 + ".toml", "recipe"),
    ],
)  # fmt: skip
def test_a_recipe_that_is_not_there_is_named(name: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "--set: expected KEY=VALUE, got 'seed'"),
        ("=3", "--set: expected KEY=VALUE"),
        ("a..b=3", "--set: expected KEY=VALUE"),
        ("name.x=3", "--set name.x: expected a table at 'name', got a value"),
        ("trunk.tokns=3", "--set trunk.tokns: expected a known key, got an unknown one; did you mean 'tokens'?"),
        ("trunk.tokens=x", "--set trunk.tokens: expected a count"),
        ("trunk={tokens='x'}", "--set trunk.tokens: expected a count"),
        ("model.size=0.02M", "--set model.size: expected a target"),
        ("corpus=none", "corpus: expected a value, got none"),
    ],
)
def test_a_wrong_override_is_named_by_its_option(override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    one_line(str(caught.value))
    assert words in str(caught.value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_recipe_gives_anything_but_one_line(data: st.DataObject, tmp_path: Path) -> None:
    text = GOOD.encode()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 12)))
        snippet = data.draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from([b"[", b"]", b'"', b"{", b"}", b"=", b"\n", b"nan", b"1e999", b"''", b"."]),
            )
        )
        text = text[:start] + snippet + text[stop:]
    file = tmp_path / "damaged.toml"
    file.write_bytes(text)
    try:
        load_recipe(file)
    except RecipeError as error:
        one_line(str(error))


def test_all_of_this_happens_without_torch(tmp_path: Path) -> None:
    for number, (old, new, _) in enumerate(LINES):
        (tmp_path / f"{number}.toml").write_text(GOOD.replace(old, new), encoding="utf-8")
    script = (
        "import sys, pathlib; from windtunnel import cli\n"
        "codes = {cli._run(['plan', str(f)]) for f in pathlib.Path(sys.argv[1]).glob('*.toml')}\n"
        "assert codes == {2}, codes\n"
        "heavy = {'torch', 'scipy', 'pyarrow', 'tokenizers', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == len(LINES)
