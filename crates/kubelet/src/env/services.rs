//! Variables that name Services.

use std::collections::BTreeMap;

use cluster::Key;
use k8s_openapi::api::core::v1::Service;

use super::Sources;

/// Variables of the services that a pod can see: `kubernetes` of the default namespace always, those of its own
/// namespace with `enableServiceLinks` (the default).
pub(super) fn variables(sources: &Sources<'_>) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    if let Some(service) = sources.store.services().get(&Key::new("default", "kubernetes")) {
        add_service(&mut variables, &service);
    }
    if pod::spec::of(sources.pod).enable_service_links != Some(false) {
        for service in sources.store.services().list_namespace(sources.namespace()) {
            add_service(&mut variables, &service);
        }
    }
    variables
}

fn add_service(variables: &mut BTreeMap<String, String>, service: &Service) {
    let Some(spec) = &service.spec else { return };
    let Some(ip) = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None") else { return };
    let upper = |name: &str| name.replace('-', "_").to_uppercase();
    let prefix = upper(service.metadata.name.as_deref().unwrap_or_default());
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
    variables.insert(format!("{prefix}_SERVICE_HOST"), ip.to_owned());
    for (index, port) in spec.ports.iter().flatten().enumerate() {
        let number = port.port.to_string();
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let url = format!("{}://{host}:{number}", protocol.to_lowercase());
        if index == 0 {
            variables.insert(format!("{prefix}_SERVICE_PORT"), number.clone());
            variables.insert(format!("{prefix}_PORT"), url.clone());
        }
        if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            variables.insert(format!("{prefix}_SERVICE_PORT_{}", upper(name)), number.clone());
        }
        let link = format!("{prefix}_PORT_{number}_{}", protocol.to_uppercase());
        variables.insert(format!("{link}_PROTO"), protocol.to_lowercase());
        variables.insert(format!("{link}_PORT"), number);
        variables.insert(format!("{link}_ADDR"), ip.to_owned());
        variables.insert(link, url);
    }
}
