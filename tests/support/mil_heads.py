"""Info of small MIL heads, and the deviation of their members."""


def info_of(**changes) -> dict:
    info = {
        "genes": ["EPCAM", "CD3E", "ERBB2"],
        "scaling": {"C2": [1.0, 2.5, 0.1], "C3": [1.0, 1.0, 1.0]},
        "embedding_dim": 20,
        "encoder_digest": "abc",
        "training_slides": ["C2", "C3"],
        "metrics": {"val_loss": 0.25},
    }
    return info | changes


def spread_from_hidden(head, hidden_NH):
    """Return the standard deviation over members [N, G] from the last hidden layer."""
    return head._expression_NKG(hidden_NH).std(1, correction=0)
