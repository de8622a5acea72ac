"""Package definition; tested versions are in constraints.txt."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

REQUIRED = [
    'absl-py>=2.1',
    'aiohttp>=3.9',
    'etils[epath]>=1.9',
    'flax>=0.10',
    'google-genai>=1.0',
    'grain>=0.2.3',
    'importlib_resources',  # tensorflow-datasets needs it, undeclared
    'jax>=0.6',
    'jinja2>=3.1',  # chat templates
    'math-verify>=0.7',
    'matplotlib>=3.8',
    'ml-collections>=1.0',
    'numpy>=1.26',
    'optax>=0.2.6',
    'orbax-checkpoint>=0.11',
    'pyyaml>=6',
    'rich>=13',
    'safetensors>=0.4',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.6',
    'tokenizers>=0.20',
    'transformers>=5.0',
]

SERVE = ['prometheus-client>=0.20', 'starlette>=0.40', 'uvicorn>=0.30']
EXTRAS = {
    'tpu': ['etils[epath-gcs]', 'jax[tpu]'],
    'gcs': ['etils[epath-gcs]'],
    'cuda': ['jax[cuda12]'],
    'anthropic': ['anthropic>=0.40'],
    # gguf turns a packaged GGUF model into a guide directory; the server
    # itself is fetched by launch/local_core.sh, which knows its traps.
    'local': ['gguf>=0.17'],
    'serve': SERVE,
    'test': ['etils[epath-gcs]', 'ipykernel', 'nbclient>=0.10', 'nbformat',
             'openai>=2', 'pytest>=8', 'pytest-xdist>=3.6', *SERVE],
    'parity': ['peft>=0.15', 'torch>=2.4'],
}

setuptools.setup(
    name='exectune_jax',
    version='0.1.0',
    description='Train small guide models that make black-box LLMs succeed.',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8')
    if (HERE / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['exectune_jax*', 'configs']),
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
