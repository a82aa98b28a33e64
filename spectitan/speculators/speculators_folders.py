"""config.json in the format of vLLM's speculators: what its families share, written and read."""

from spectitan.models.config_file import ConfigFile

VERSION = "0.9.0"  # of the speculators package whose format this is


def speculators_config(algorithm: str, architecture: str, speculative_tokens: int, decoder: dict, own: dict) -> dict:
    """All flags are written: their defaults differ between readers. What is said of the base is added by `name_verifier`.

    Args:
        decoder: transformer_layer_config.
        own: the family's keys.
    """
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": speculative_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": [architecture],
        "speculators_model_type": algorithm,
        "speculators_version": VERSION,
        **own,
        "tie_word_embeddings": False,
        "transformer_layer_config": decoder,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": None, "architectures": []},
        },
    }


def name_verifier(config: dict, name: str, architecture: str) -> None:
    config["speculators_config"]["verifier"] = {"name_or_path": name, "architectures": [architecture]}
    config["dtype"] = "float32"


def read_speculative_tokens(file: ConfigFile, default: int) -> int:
    """Of the proposal method that is the default one."""
    if file.get("speculators_config") is None:
        return default
    inner = file.inside("speculators_config")
    methods, chosen = inner.get("proposal_methods") or [], inner.get("default_proposal_method")
    inner.must(isinstance(methods, list) and all(isinstance(method, dict) for method in methods), "proposal_methods", "a list is expected")
    tokens = [method.get("speculative_tokens") for method in methods if method.get("proposal_type") == chosen]
    tokens = [number for number in tokens if number is not None] or [default]
    inner.must(type(tokens[0]) is int and 1 <= tokens[0] <= 64, "proposal_methods", "speculative_tokens from 1 to 64 are expected")
    return tokens[0]
