"""Secrets in all their forms are refused and not shown, harmless texts pass, and time is linear."""

import json
import time

import pytest

from scellst_ray.storage.credentials import redact, refuse_credentials, secret_in
from scellst_ray.storage.secret_forms import has_secret_name

KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
# A text, and the part of it that nobody may see.
USERS = [
    (f"s3://AKIAIOSFODNN7EXAMPLE:{KEY}@bucket/a.svs", "MDENG"),
    (f"S3://AKIAIOSFODNN7EXAMPLE:{KEY}@bucket/a.svs", "MDENG"),
    (f"simplecache::s3://AKIAIOSFODNN7EXAMPLE:{KEY}@bucket/a.svs", "MDENG"),
    ("s3://key:12345/67@bucket/a.svs", "67"),
    ("oss://key:ab/cd@bucket/a.svs", "ab/cd"),
    ("https://user:pa/ss@host/a.svs", "pa/ss"),
    ("https://user:pa#ss@host/a.svs", "pa#ss"),
    ("https://user:pa?ss@host/a.svs", "pa?ss"),
    ("https://user:pa@ss@host/a.svs", "pa@ss"),
    ("https://user:p@s/s@host/a.svs", "s/s"),
    ("https://user:p:a:ss@host/a.svs", "p:a:ss"),
    ("https://user:pa://ss@host/a.svs", "pa:"),
    ("https://user:/pass@host/a.svs", "/pass"),
    ("https://user:#pass@host/a.svs", "#pass"),
    ("https://user:?pass@host/a.svs", "?pass"),
    ("https://user:pa ss@host/a.svs", "pa ss"),
    ("https://user:pa'ss@host/a.svs", "pa'ss"),
    ("https://:hunter2@[::1]:80/a.svs", "hunter2"),
    ("https:/user:pa/ss@host/a.svs", "pa/ss"),
    ("zip://a@b.svs::https://user:pa/ss@host/a.zip", "pa/ss"),
    ("https://proxy/https://user:pa/ss@host/a.svs", "pa/ss"),
    ("https://proxy/https%3A%2F%2Fuser%3Ahunter2%40host%2Fa.svs", "hunter2"),
    ("https://proxy/https%253A%252F%252Fuser%253Ahunter2%2540host%252Fa.svs", "hunter2"),
    ("https://user%3Ahunter2@host/a.svs", "hunter2"),
    ("smb://DOMAIN;user:hunter2@host/a.svs", "hunter2"),
]
PARAMETERS = [
    *("auth", "jwt", "bearer", "pwd", "pass", "client_secret", "download_key", "downloadkey"),
    *("sig", "SiG", "Signature", "accessToken", "id_token", "API-KEY", "x-api-key", "passphrase"),
    *("sv=2022&code", "AWSAccessKeyId=A&Signature", "X-Amz-Signature", "x-amz-security-token"),
    *("X-Goog-Signature", "GoogleAccessId", "OSSAccessKeyId=A&x-oss-signature", "JSESSIONID"),
    *("q-ak=A&q-signature", "Key-Pair-Id", "a=1;sig", "a=1,token", "v=1&amp;sig", "sas", "hmac"),
    *("%73ig", "%2573ig", "tok%65n", "%58-Amz-Signature", "s%69g"),
]
OTHERS = [
    ("https://host/a.svs#token=hunter2", "hunter2"),
    ("https://host/a.svs#a=1&access_token=hunter2", "hunter2"),
    ("https://host/a.svs;sig=hunter2", "hunter2"),
    ('https://host/a.svs?sig="hunter2"', "hunter2"),
    ("https://host/a.svs?a=1&token='hunter2'&b=2", "hunter2"),
    ("curl -H 'X-Api-Key: hunter2' host/a", "hunter2"),
    ("Ocp-Apim-Subscription-Key: hunter2", "hunter2"),
    ("PRIVATE-TOKEN: hunter2", "hunter2"),
    ("https://host/a.svs%3Fsig%3Dhunter2", "hunter2"),
    ("host/a.svs?token=hunter2", "hunter2"),
    ("zip://a?token=hunter2::https://host/a.zip", "hunter2"),
    ("DefaultEndpointsProtocol=https;AccountName=a;AccountKey=hunter2==;X=y", "hunter2"),
    (
        "BlobEndpoint=https://a.blob.core.windows.net/;SharedAccessSignature=sv=1&sig=hunter2",
        "hunt",
    ),
    ("Endpoint=sb://a.net/;SharedAccessKeyName=R;SharedAccessKey=hunter2=", "hunter2"),
    ("sv=2022-11-02&ss=b&sig=hunter2%3D", "hunter2"),
    ("Authorization: Bearer hunter2", "hunter2"),
    ("curl -H 'authorization: Basic aHVudGVyMg==' https://host/a", "aHVudGVyMg"),
    ("Authorization: AWS4-HMAC-SHA256 Credential=A/2020, Signature=hunter2", "hunter2"),
    ("Bearer abcdefgh12345678", "abcdefgh"),
    ("hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "abcdefgh"),
    ("https://huggingface.co/hf_abcdefghijklmnopqrstuvwxyzABCDEFGH/a.svs", "abcdefgh"),
    ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "abcdefgh"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc-DEF", "eyJzd"),
    ("AWS_SECRET_ACCESS_KEY=hunter2 AWS_REGION=x", "hunter2"),
    ("aws_secret_access_key = hunter2", "hunter2"),
    ("key=AKIA,secret=hunter2", "hunter2"),
    ('{"key": "AKIA", "secret": "hunter2"}', "hunter2"),
    ("{'token': 'hunter 2'}", "hunter 2"),
    ('{\\"sas_token\\": \\"hunter2\\"}', "hunter2"),
    ("-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----", "hunter2"),
]
SECRETS = [*USERS, *((f"https://host/a.svs?{n}=hunter2", "hunter2") for n in PARAMETERS), *OTHERS]

HARMLESS = [
    "s3://bucket/a.svs",
    "s3://bucket/a@b.svs",
    "s3://bucket/a:b@c.svs",
    "s3://bucket/a#1;b.svs",
    "s3://bucket/a%40b 100%.svs",
    "gs://bucket/a b @ 20x.svs",
    "abfs://container@account.dfs.core.windows.net/a.svs",
    "s3://bucket/key=value/sig=none/a.svs",
    "s3://bucket/token/secret/password=none/a.svs",
    "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/name/a@b.svs",
    "arn:aws:secretsmanager:us-east-1:123:secret:name",
    "zip://a@b.svs::s3://bucket/a.zip",
    "hf://datasets/org/name@main/a.svs",
    "http://minio:9000/bucket/user@site/a.svs",
    "http://[::1]:9000/a@b.svs",
    "https://host/~user@site/a.svs",
    "https://host/a.svs?versionId=3",
    "https://host/a.svs?page=2&download=1&sort_key=name",
    "https://host/a.svs?author=me&design=1&signal=2&monkey=3&passage=4&oncotree_code=BRCA",
    "https://host/a.svs?token=&sig=none",
    "https://host/search?q=a@b.org",
    "file:///C:/a@b.svs",
    "file://C:/a@b.svs",
    "C:\\Users\\me@home\\a.svs",
    "/data/a@b/c?d.svs",
    "sig-12_signature.svs",
    "hf_heart_failure_patient_01",
    "sk-mel-28-melanoma-cell-line-1-slide-3",
    "ask me@example.org: 12 slides, the key is under the mat",
    '{"key": "value", "code": "BRCA", "type": "secretory", "num_tokens": 5}',
    "Bearer of the slide: Dr. X",
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_every_form_is_refused_and_hidden(text, secret):
    reason = secret_in(text)
    assert reason is not None
    assert secret not in reason
    for shown in (text, f"cannot read {text}", f"ValueError: {text}\nsee above"):
        assert secret not in redact(shown)


@pytest.mark.parametrize(("text", "secret"), USERS)
def test_text_around_a_password_does_not_save_it(text, secret):
    for shown in (f"cannot read {text}: denied", f"'{text}' (denied)", f"{text} and {text}"):
        assert secret not in redact(shown)


def test_a_text_that_is_a_uri_ends_with_its_secret():
    text = "https://host/a?password=hunter2 is'mine"
    assert redact(text) == "https://host/a"
    assert "mine" not in secret_in(text)


def test_a_quote_behind_a_parameter_ends_it():
    text = "the address is 'https://host/a.svs?token=' and what you were sent"
    assert secret_in(text) is None
    assert redact(text) == "the address is 'https://host/a.svs' and what you were sent"


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_pass_and_are_shown(text):
    assert secret_in(text) is None
    assert redact(text) == (text if "://" not in text else text.split("?")[0])


ADVERSARIAL = {
    "a long word": "x",
    "marks of schemes": "://",
    "schemes": "a://",
    "schemes after colons": ":a://b/",
    "users": "a:b@",
    "users without end": ":x://u:p",
    "percent signs": "%",
    "encoded percent signs": "%25",
    "parameters": "&sig=",
    "assignments": "password:",
    "quotes": '{"',
    "tokens": "hf_",
    "parts of tokens": "eyJ",
    "headers": "bearer ",
    "keys": "-----BEGIN ",
    "lines": "s3://u:p@\n",
    "spaces": " ",
}


@pytest.mark.parametrize("part", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_time_is_linear(part):
    """100 kB take milliseconds; with the square of the length they would take a minute."""
    text = part * (100_000 // len(part))
    started = time.process_time()
    secret_in(text)
    redact(f"{text}@")
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "config",
    [
        {"storage_options": {"key": "AKIA", "secret": "hunter2"}},
        {"storage": {"client_kwargs": {"aws_secret_access_key": "hunter2"}}},
        {"uris": [{"uri": "https://me:hun/ter2@host/a"}]},
        {"note": json.dumps({"account_key": "hunter2"})},
    ],
)
def test_nested_configurations_are_refused(config):
    with pytest.raises(ValueError, match="was given with credentials") as raised:
        refuse_credentials(config)
    assert "ter2" not in str(raised.value)


def test_names_are_read_by_their_words():
    assert all(map(has_secret_name, ("fooSecretBar", "my-auth", "%74oken", "SASToken")))
    assert not any(
        map(has_secret_name, ("assignment", "compass", "bypass", "authority", "keyframe"))
    )
