"""One step with the installed wheel alone: a small model from a configuration, a task that can be learned."""

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from onestep_peft import OneStepConfig, OneStepTrainer, load

WORDS = ["[PAD]", "[UNK]", "[CLS]", "red", "blue", "green", "grey"]

vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="[PAD]", unk_token="[UNK]").save_pretrained("base")
config = BertConfig(
    vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)
BertModel(config).save_pretrained("base")

random.seed(0)
rows = [
    {"text": f"{colour} {random.choice(WORDS[3:])} {random.choice(WORDS[3:])}", "label": colour}
    for colour in random.choices(["red", "green"], k=200)
]
trainer = OneStepTrainer(model="base", args=OneStepConfig(output_dir="adapter"), train_dataset=rows)
trainer.train()
print(trainer.report.summary())
trainer.save_model()
model, tokenizer = load("adapter")
assert list(model.config.id2label.values()) == ["green", "red"]
