//! `/statusz` and `/flagz`: what runs here, and with which flags; for people, and for programs that name kind and version of
//! what they want (KEP-4827, KEP-4828).

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Answer, Api, Failure, PATHS, json_body, with_body};
use crate::KUBERNETES;
use http::{HeaderValue, StatusCode};

/// The API group of both pages' kinds.
const GROUP: &str = "config.k8s.io";

/// A form of a page.
#[derive(Debug, PartialEq, Eq)]
enum Form {
    /// For people.
    Text,
    /// For programs: JSON of this version.
    Json(&'static str),
}

impl Api {
    /// Since when it runs, its version and its paths.
    pub(super) fn statusz(&self, accept: &str) -> Answer {
        let began = Timestamp::from_second(i64::try_from(instruments::process::started_s()).unwrap_or(0));
        let began = began.unwrap_or(Timestamp::UNIX_EPOCH);
        let up_s = Timestamp::now().duration_since(began).as_secs().max(0);
        let paths: Vec<String> = PATHS.iter().map(|path| format!("/{path}")).collect();
        // There is no Go here, and the field may not be missing.
        let go = "none";
        let binary = KUBERNETES.trim_start_matches('v');
        let emulated = binary.rsplit_once('.').map_or(binary, |(minor, _)| minor);
        let text = format!(
            "\nStarted: {}\nUp: {} hr {:02} min {:02} sec\nGo version: {go}\nBinary version: {binary}\nEmulation version: \
             {emulated}\nPaths: {}\n",
            began.strftime("%a %b %e %H:%M:%S UTC %Y"),
            up_s / 3600,
            up_s / 60 % 60,
            up_s % 60,
            paths.join(" "),
        );
        let fields = json!({
            "startTime": began.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            "uptimeSeconds": up_s,
            "goVersion": go,
            "binaryVersion": binary,
            "emulationVersion": emulated,
            "paths": paths,
        });
        page("Statusz", accept, &text, fields)
    }

    /// The flags, with their values.
    pub(super) fn flagz(&self, accept: &str) -> Answer {
        let line = |(name, value): (&String, &String)| format!("{name}={value}\n");
        let text: String = self.flags.iter().map(line).collect();
        page("Flagz", accept, &text, json!({"flags": *self.flags}))
    }
}

fn page(kind: &str, accept: &str, text: &str, mut fields: Value) -> Answer {
    let name = kind.to_ascii_lowercase();
    let warning = "Warning: This endpoint is not meant to be machine parseable, has no formatting compatibility guarantees and \
                   is for debugging purposes only.";
    match wanted(accept, kind) {
        Some(Form::Text) => {
            let body = format!("\nkubelet {name}\n{warning}\n{text}");
            Ok(with_body(StatusCode::OK, "text/plain; charset=utf-8", body))
        }
        Some(Form::Json(version)) => {
            fields["kind"] = kind.into();
            fields["apiVersion"] = format!("{GROUP}/{version}").into();
            fields["metadata"] = json!({"name": "kubelet"});
            let mut response = json_body(&fields);
            let told =
                format!("299 - \"This version of the {name} endpoint is deprecated. Please use a newer version.\"");
            if version == "v1alpha1"
                && let Ok(told) = HeaderValue::try_from(told)
            {
                response.headers_mut().insert(http::header::WARNING, told);
            }
            Ok(response)
        }
        None => {
            let accepted = format!("application/json;g={GROUP};v=v1beta1;as={kind}, text/plain");
            let message = format!("only the following media types are accepted: {accepted}");
            Err(Failure::new(StatusCode::NOT_ACCEPTABLE, message))
        }
    }
}

/// The first form of those that the caller accepts which there is; text for who does not say.
fn wanted(accept: &str, kind: &str) -> Option<Form> {
    if accept.trim().is_empty() {
        return Some(Form::Text);
    }
    accept.split(',').find_map(|range| {
        let mut parts = range.split(';').map(str::trim);
        let media = parts.next()?;
        let parameters: Vec<(&str, &str)> = parts.filter_map(|part| part.split_once('=')).collect();
        let get = |name| parameters.iter().find(|(key, _)| *key == name).map(|(_, value)| *value);
        let version = ["v1beta1", "v1alpha1"].into_iter().find(|version| get("v") == Some(*version));
        match (media, get("g"), get("as")) {
            ("text/plain" | "text/*" | "*/*", None, None) => Some(Form::Text),
            ("application/json" | "application/*" | "*/*", Some(GROUP), Some(wanted)) if wanted == kind => {
                version.map(Form::Json)
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_names_a_kind_gets_it() {
        let check = |accept: &str, expect: Option<Form>| assert_eq!(wanted(accept, "Statusz"), expect, "{accept}");
        check("", Some(Form::Text));
        check("*/*", Some(Form::Text));
        check("text/plain;q=0.5", Some(Form::Text));
        check("application/json;v=v1beta1;g=config.k8s.io;as=Statusz", Some(Form::Json("v1beta1")));
        check("application/json; v=v1alpha1; g=config.k8s.io; as=Statusz, text/plain", Some(Form::Json("v1alpha1")));
        check("application/json", None);
        check("application/json, */*", Some(Form::Text));
        check("application/json;v=v1beta1;g=config.k8s.io;as=Flagz", None);
        check("application/json;v=v2;g=config.k8s.io;as=Statusz", None);
    }
}
