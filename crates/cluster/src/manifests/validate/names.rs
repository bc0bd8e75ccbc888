//! Rules for names, keys and values. Each returns what is wrong, in the API server's words, or `None`.

fn alphanumeric(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn edges(text: &str, allowed: impl Fn(u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    matches!((bytes.first(), bytes.last()), (Some(first), Some(last)) if allowed(*first) && allowed(*last))
}

fn too_long(text: &str, max: usize) -> Option<String> {
    (text.len() > max).then(|| format!("must be no more than {max} characters"))
}

fn is_label(text: &str) -> bool {
    edges(text, alphanumeric) && text.bytes().all(|byte| alphanumeric(byte) || byte == b'-')
}

/// RFC 1123 label: names of namespaces, containers, volumes.
pub(crate) fn dns_label(text: &str) -> Option<String> {
    const MESSAGE: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must \
        start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
        '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
    too_long(text, 63).or_else(|| (!is_label(text)).then(|| MESSAGE.into()))
}

/// RFC 1123 subdomain: names of most objects.
pub(crate) fn dns_subdomain(text: &str) -> Option<String> {
    const MESSAGE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', \
        and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
        '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
    too_long(text, 253).or_else(|| (!text.split('.').all(is_label)).then(|| MESSAGE.into()))
}

/// RFC 1035 label: names of services.
pub(crate) fn dns_1035_label(text: &str) -> Option<String> {
    const MESSAGE: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
        alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
        validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
    let valid = is_label(text) && text.as_bytes()[0].is_ascii_lowercase();
    too_long(text, 63).or_else(|| (!valid).then(|| MESSAGE.into()))
}

fn is_name_part(text: &str) -> bool {
    edges(text, |byte| byte.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// Keys of labels and annotations: `[prefix/]name`.
pub(crate) fn qualified_name(key: &str) -> Option<String> {
    const MESSAGE: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with \
        an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
        '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let prefix_fault = prefix.and_then(dns_subdomain).map(|fault| format!("prefix part {fault}"));
    let length = || too_long(name, 63).map(|fault| format!("name part {fault}"));
    prefix_fault.or_else(length).or_else(|| (!is_name_part(name)).then(|| MESSAGE.into()))
}

/// Values of labels.
pub(crate) fn label_value(value: &str) -> Option<String> {
    const MESSAGE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', \
        and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used \
        for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
    too_long(value, 63).or_else(|| (!value.is_empty() && !is_name_part(value)).then(|| MESSAGE.into()))
}

/// Keys of ConfigMaps and Secrets.
pub(crate) fn config_key(key: &str) -> Option<String> {
    const MESSAGE: &str = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or \
        'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";
    let valid =
        !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    match key {
        "." => Some("must not be '.'".into()),
        _ if key.starts_with("..") => Some("must not start with '..'".into()),
        _ => too_long(key, 253).or_else(|| (!valid).then(|| MESSAGE.into())),
    }
}

/// Names of environment variables (relaxed since 1.30: any printable ASCII but `=`).
pub(crate) fn env_name(name: &str) -> Option<String> {
    const MESSAGE: &str =
        "a valid environment variable name must consist only of printable ASCII characters other than '='";
    let valid = name.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b'=');
    (!valid).then(|| MESSAGE.into())
}

/// Names of ports (IANA service names).
pub(crate) fn port_name(name: &str) -> Option<String> {
    let message = match name {
        _ if name.len() > 15 => "must be no more than 15 characters",
        _ if !name.bytes().all(|byte| alphanumeric(byte) || byte == b'-') => {
            "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
        }
        _ if !name.bytes().any(|byte| byte.is_ascii_lowercase()) => "must contain at least one letter (a-z)",
        _ if name.contains("--") => "must not contain consecutive hyphens",
        _ if name.starts_with('-') || name.ends_with('-') => "must not begin or end with a hyphen",
        _ => return None,
    };
    Some(message.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        type Rule = fn(&str) -> Option<String>;
        let cases: [(Rule, &[&str], &[&str]); 7] = [
            (dns_label, &["a", "a-b", "1a"], &["", "A", "-a", "a-", "a.b", "a_b"]),
            (dns_subdomain, &["a", "a.b-c", "1.2"], &["", "a..b", ".a", "A.b"]),
            (dns_1035_label, &["a", "a1"], &["1a", "a.b", ""]),
            (qualified_name, &["app", "a.b/C_d", "x"], &["", "a/", "/a", "a/b/c", "-a"]),
            (label_value, &["", "v1.2_x"], &["a b", "-a"]),
            (config_key, &["a.b", ".hidden", "KEY_1"], &["", ".", "..x", "a/b"]),
            (port_name, &["http", "a-1"], &["-a", "a--b", "123", "HTTP", "much-too-long-name"]),
        ];
        for (rule, good, bad) in cases {
            good.iter().for_each(|text| assert_eq!(rule(text), None, "{text}"));
            bad.iter().for_each(|text| assert!(rule(text).is_some(), "{text}"));
        }
        assert_eq!(env_name("my.var-1"), None);
        assert!(env_name("a=b").is_some());
        assert!(dns_label(&"a".repeat(64)).unwrap().contains("63"));
    }
}
