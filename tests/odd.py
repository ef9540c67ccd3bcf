"""A causal LM of nobody's: layers of unusual modules, importable, registered with transformers' Auto classes."""
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class OddConfig(PreTrainedConfig):
    model_type = "odd"

    def __init__(self, vocab_size=96, hidden_size=64, num_hidden_layers=3, handed_on=False, twins=False, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.handed_on, self.twins = handed_on, twins
        super().__init__(**kwargs)


class Mixer(nn.Module):
    """Attention of one head, by hand, behind a causal convolution."""

    def __init__(self, size):
        super().__init__()
        self.look = nn.Conv1d(size, size, 3, padding=2, groups=size)
        self.pair = nn.ModuleDict({"ask": nn.Linear(size, size), "answer": nn.Linear(size, size, bias=False)})

    def forward(self, x):
        seen = self.look(x.transpose(1, 2))[..., :x.shape[1]].transpose(1, 2)
        scores = self.pair["ask"](seen) @ seen.transpose(1, 2) * seen.shape[-1] ** -0.5
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return scores.masked_fill(~causal, -1e9).softmax(-1) @ self.pair["answer"](seen)


class OddLayer(nn.Module):
    """One linear map in an odd place in every second layer, so that layers are of two kinds."""

    def __init__(self, config, index):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(config.hidden_size), Mixer(config.hidden_size)
        self.deep = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(config.hidden_size, 96), nn.GELU()),
                                  nn.Linear(96, config.hidden_size)) if index % 2 == 0 else nn.Identity()

    def forward(self, hidden, *, before=None):
        mixed = self.mixer(self.norm(hidden))
        return (hidden + self.deep(mixed if before is None else mixed + before), mixed)


class OddBase(PreTrainedModel):
    config_class, base_model_prefix = OddConfig, "trunk"

    def _init_weights(self, module):
        pass


class OddModel(OddBase):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stages = nn.ModuleList(OddLayer(config, i) for i in range(config.num_hidden_layers))
        if config.twins:
            self.others = nn.ModuleList(OddLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, use_cache=None, **kwargs):
        hidden, before = self.words(input_ids) if inputs_embeds is None else inputs_embeds, None
        for stage in self.stages:
            hidden, mixed = stage(hidden, before=before)
            before = mixed if self.config.handed_on else None
        return BaseModelOutput(last_hidden_state=functional.normalize(hidden, dim=-1))


class OddForCausalLM(OddBase, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.trunk = OddModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.trunk(input_ids, **kwargs).last_hidden_state))


def register():
    AutoConfig.register("odd", OddConfig, exist_ok=True)
    AutoModelForCausalLM.register(OddConfig, OddForCausalLM, exist_ok=True)
