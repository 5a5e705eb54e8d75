// Command policy-server is the part of kube-apiserver that admits and stores custom resources: Kubernetes' own
// apiextensions-apiserver with its admission plugins, among them those of admission policies.
//
// Everything else of a cluster (namespaces, the policies themselves) it reads from the API server that --kubeconfig
// names, which sends it the requests of users that it has authenticated and authorized, as kube-aggregator does.
package main

import (
	"log"
	"os"

	"github.com/spf13/pflag"
	"k8s.io/apiextensions-apiserver/pkg/cmd/server/options"
	"k8s.io/apiserver/pkg/authentication/request/headerrequest"
	"k8s.io/apiserver/pkg/authorization/authorizerfactory"
	"k8s.io/apiserver/pkg/server"
)

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	o := options.NewCustomResourceDefinitionsServerOptions(os.Stdout, os.Stderr)
	o.RecommendedOptions.Authentication = nil
	o.RecommendedOptions.Authorization = nil
	o.RecommendedOptions.Features.EnablePriorityAndFairness = false
	o.RecommendedOptions.Admission.DisablePlugins = []string{
		"MutatingAdmissionPolicy", "MutatingAdmissionWebhook", "ValidatingAdmissionWebhook"}
	o.AddFlags(pflag.CommandLine)
	pflag.Parse()
	if err := o.Complete(); err != nil {
		return err
	}
	if err := o.Validate(); err != nil {
		return err
	}
	config, err := o.Config()
	if err != nil {
		return err
	}
	generic := config.GenericConfig
	generic.Authentication.Authenticator, err = headerrequest.New(
		[]string{"X-Remote-User"}, nil, []string{"X-Remote-Group"}, []string{"X-Remote-Extra-"})
	if err != nil {
		return err
	}
	generic.Authorization.Authorizer = authorizerfactory.NewAlwaysAllowAuthorizer()
	made, err := config.Complete().New(server.NewEmptyDelegate())
	if err != nil {
		return err
	}
	return made.GenericAPIServer.PrepareRun().RunWithContext(server.SetupSignalContext())
}
