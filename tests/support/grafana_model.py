"""Grafana's model of a dashboard as a JSON schema."""

_SOURCE = {"type": "object", "required": ["type", "uid"], "additionalProperties": False,
           "properties": {"type": {"const": "prometheus"}, "uid": {"const": "${datasource}"}}}  # fmt: skip
_MOMENT = {"pattern": "^now(-[0-9]+[mhd])?$"}
_TEXT = {"type": "string"}
_PLACE = {
    "type": "object",
    "required": ["x", "y", "w", "h"],
    "additionalProperties": False,
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 23},
        "y": {"type": "integer", "minimum": 0},
        "w": {"type": "integer", "minimum": 1, "maximum": 24},
        "h": {"type": "integer", "minimum": 1},
    },
}
DASHBOARD = {
    "type": "object",
    "required": ["uid", "title", "schemaVersion", "panels", "templating", "time"],
    "additionalProperties": False,
    "properties": {
        "uid": {"type": "string", "minLength": 8, "maxLength": 40, "pattern": "^[a-zA-Z0-9_-]+$"},
        "title": {"type": "string", "minLength": 1},
        "schemaVersion": {"type": "integer", "minimum": 36},
        "refresh": {"type": "string", "pattern": "^[0-9]+[smhd]$"},
        "time": {"type": "object", "required": ["from", "to"], "additionalProperties": _MOMENT},
        "tags": {"type": "array", "items": {"type": "string"}},
        "templating": {"type": "object", "required": ["list"], "properties": {"list": {"type": "array", "items": {
            "type": "object",
            "required": ["name", "type", "query"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]+$"},
                "type": {"enum": ["query", "adhoc", "constant", "datasource", "interval", "textbox", "custom"]},
                "query": {"type": "string"}, "datasource": _SOURCE, "refresh": {"enum": [0, 1, 2]},
                "multi": {"type": "boolean"}, "includeAll": {"type": "boolean"},
            },
        }}}},
        "panels": {"type": "array", "minItems": 1, "items": {
            "type": "object",
            "required": ["id", "type", "title", "datasource", "gridPos", "fieldConfig", "targets"],
            "additionalProperties": False,
            "properties": {
                "id": {"type": "integer", "minimum": 1},
                "type": {"enum": ["timeseries", "stat", "gauge", "bargauge", "table", "heatmap", "barchart"]},
                "title": {"type": "string"}, "description": {"type": "string"}, "datasource": _SOURCE,
                "gridPos": _PLACE,
                "fieldConfig": {"type": "object", "required": ["defaults", "overrides"], "properties": {
                    "defaults": {"type": "object", "properties": {
                        "unit": {"enum": ["none", "short", "percentunit", "s", "decbytes", "bytes", "cps", "reqps"]},
                        "min": {"type": "number"}, "max": {"type": "number"},
                    }},
                    "overrides": {"type": "array"},
                }},
                "options": {"type": "object"},
                "targets": {"type": "array", "minItems": 1, "items": {
                    "type": "object", "required": ["refId", "expr"],
                    "properties": {"refId": {"pattern": "^[A-Z]$"}, "expr": _TEXT, "legendFormat": _TEXT},
                }},
            },
        }},
    },
}  # fmt: skip
"""Grafana's model of a dashboard (kinds/dashboard/dashboard_kind.cue), as far as ours uses it."""
