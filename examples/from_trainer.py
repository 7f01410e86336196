"""A script for `transformers.Trainer`, turned into one step: three lines change, marked (1), (2) and (3).

What a schedule needs (learning rate, epochs, warm-up, weight decay) may stay where it is: it is told that it is not
used. Without a `peft_config` the trainer puts a LoRA of rank 8 on the model.

python examples/from_trainer.py                        # the encoder comes from the Hub
python examples/from_trainer.py --model path/to/encoder
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from onestep_peft import OneStepConfig, OneStepTrainer, load  # (1) from transformers import Trainer, TrainingArguments

MESSAGES = Path(__file__).parent / "data" / "customer_messages"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a Hub id or a folder")
parser.add_argument("--dataset", default=str(MESSAGES), help="a Hub id or a folder, with splits train and test")
parser.add_argument("--output-dir", default="onestep_output", help="where results go; must not hold a run")
arguments = parser.parse_args()

rows = load_dataset(arguments.dataset).class_encode_column("label")
names = rows["train"].features["label"].names
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
tokens = rows.map(lambda batch: tokenizer(batch["text"], truncation=True), batched=True, remove_columns="text")
model = AutoModelForSequenceClassification.from_pretrained(
    arguments.model,
    num_labels=len(names),
    id2label=dict(enumerate(names)),
    label2id={n: i for i, n in enumerate(names)},
)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


trainer = OneStepTrainer(  # (2) Trainer(
    model=model,
    args=OneStepConfig(  # (3) TrainingArguments(
        output_dir=arguments.output_dir,
        per_device_train_batch_size=16,
        seed=0,
    ),
    train_dataset=tokens["train"],
    eval_dataset=tokens["test"],
    data_collator=DataCollatorWithPadding(tokenizer),
    compute_metrics=accuracy,
    processing_class=tokenizer,
)
print("before:", trainer.evaluate())
trainer.train()
print("after: ", trainer.evaluate())
print(trainer.report.summary())
trainer.save_model()

model, tokenizer = load(arguments.output_dir)
inputs = tokenizer("why was I charged twice??", return_tensors="pt")
print(model.config.id2label[int(model(**inputs).logits.argmax())], "<- why was I charged twice??")
