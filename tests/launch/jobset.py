"""A JSON schema of the JobSet fields that launch.cluster writes; anything else is a mistake.

Fields, types and enumerations after https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2 and
the Kubernetes API reference (Job v1, Pod v1), August 2026.
"""


def _object(required: str = "", **properties) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


_TEXT = {"type": "string", "minLength": 1}
_NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
_COUNT = {"type": "integer", "minimum": 1}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_ENV = _object(
    "name",
    name={"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
    value={"type": "string"},
    valueFrom=_object("secretKeyRef", secretKeyRef=_object("name key", name=_TEXT, key=_TEXT)),
)
_CONTAINER = _object(
    "name image command resources",
    name=_NAME,
    image=_TEXT,
    workingDir=_TEXT,
    command=_list({"type": "string"}),
    env=_list(_ENV),
    resources=_object("limits", limits=_object("google.com/tpu", **{"google.com/tpu": _COUNT})),
    volumeMounts=_list(_object("name mountPath", name=_NAME, mountPath=_TEXT)),
)
_VOLUME = _object(
    "name",
    name=_NAME,
    csi=_object("driver", driver=_TEXT, volumeAttributes=_TEXTS),
    persistentVolumeClaim=_object("claimName", claimName=_TEXT),
)
_POD = _object(
    "spec",
    metadata=_object(annotations=_TEXTS),
    spec=_object(
        "restartPolicy containers nodeSelector terminationGracePeriodSeconds",
        restartPolicy={"const": "Never"},  # what a pod failure policy wants
        terminationGracePeriodSeconds=_COUNT,
        hostNetwork={"type": "boolean"},
        dnsPolicy={"enum": ["ClusterFirst", "ClusterFirstWithHostNet"]},
        serviceAccountName=_TEXT,
        nodeSelector=_TEXTS,
        containers=_list(_CONTAINER),
        volumes=_list(_VOLUME),
    ),
)
_RULE = _object(
    "action",
    action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
    onExitCodes=_object(
        "operator values",
        containerName=_NAME,
        operator={"enum": ["In", "NotIn"]},
        values=_list({"type": "integer"}),
    ),
    onPodConditions=_list(
        _object("type status", type=_TEXT, status={"enum": ["True", "False", "Unknown"]})
    ),
)
_JOB = _object(
    "template parallelism completions backoffLimit",
    parallelism=_COUNT,
    completions=_COUNT,
    completionMode={"const": "Indexed"},
    backoffLimit={"type": "integer", "minimum": 0},
    podFailurePolicy=_object("rules", rules=_list(_RULE)),
    template=_POD,
)
_FAILURE = _object(
    "",
    maxRestarts={"type": "integer", "minimum": 0},
    rules=_list(
        _object(
            "action name",
            name=_TEXT,
            action={
                "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
            },
            onJobFailureReasons=_list(
                {
                    "enum": [
                        "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
                        "MaxFailedIndexesExceeded", "PodFailurePolicy",
                    ]
                }
            ),
        )
    ),
)  # fmt: skip
_REPLICATED = _object(
    "name template", name=_NAME, replicas=_COUNT, template=_object("spec", spec=_JOB)
)
SCHEMA = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object("name", name=_NAME, namespace=_NAME, labels=_TEXTS, annotations=_TEXTS),
    spec=_object(
        "replicatedJobs",
        failurePolicy=_FAILURE,
        replicatedJobs=_list(_REPLICATED),
    ),
)
